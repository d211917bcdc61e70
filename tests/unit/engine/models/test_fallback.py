"""Models that have no family record run through transformers' own code on our paged attention, or say why they cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.models import fallback
from engine.models.fallback import wrap_model
from engine.models.families import FAMILIES
from engine.models.refusals import refuse
from tests.unit.engine.models.cases import FALLBACK
from tests.unit.engine.models.tiny import CHUNKED, LENGTHS, ONE_SHOT, Texts, make_hf, make_spec, reference, run_steps, worst_gap

TOLERANCE = 1e-4


def wrap(hf: Any) -> fallback.FallbackModel:
    return wrap_model(hf, lambda **shape: make_spec(hf.config, **shape))


@pytest.mark.parametrize("case", FALLBACK)
def test_other_architectures_equal_transformers(case: str) -> None:
    model_type, values = FALLBACK[case]
    assert model_type not in FAMILIES
    hf = make_hf(model_type, **values)
    texts = Texts.random(hf.config.vocab_size)
    expected = reference(hf, texts)
    model = wrap(hf)
    assert worst_gap(run_steps(model, texts, ONE_SHOT), expected) < TOLERANCE
    assert worst_gap(run_steps(model, texts, CHUNKED), expected) < TOLERANCE


def test_logits_of_chosen_rows_and_taps() -> None:
    hf = make_hf("gpt_neox")
    texts = Texts.random(hf.config.vocab_size)
    with torch.inference_mode():
        plain = hf(input_ids=texts.tokens[0][None], use_cache=False, output_hidden_states=True)
    model = wrap(hf)
    step = replace(texts.step([(0, 0, LENGTHS[0])], taps=(0, 2)), logit_rows=torch.tensor([3, 8]))
    out = model.forward(step, texts.pool(model.spec))
    assert torch.allclose(out.logits, plain.logits[0][[3, 8]], atol=TOLERANCE)
    for tap in (0, 2):
        assert torch.allclose(out.taps[tap], plain.hidden_states[tap][0], atol=TOLERANCE)
    with pytest.raises(ValueError, match="gives taps 0 to 3, asked for 4"):
        model.forward(replace(step, taps=(4,)), texts.pool(model.spec))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "falcon": ({"head_dim": None}, "falcon does not use transformers' attention interface"),
    "mamba": ({}, "mamba has layers of type linear_attention, which keep a state"),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "its attention needs s_aux"),
    "deepseek_v3": ({}, "deepseek_v3 uses multi-head latent attention"),
    "bert": ({}, "gives other logits there than in transformers"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(model_type: str) -> None:
    changes, reason = REFUSED[model_type]
    with pytest.raises(ValueError, match=reason):
        wrap(make_hf(model_type, **changes))


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config

    with pytest.raises(ValueError, match="t5 is an encoder-decoder model"):
        refuse(T5Config())


def test_a_window_that_never_reaches_the_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = fallback._paged_attention
    monkeypatch.setattr(fallback, "_paged_attention", lambda *args, sliding_window=None, **others: attention(*args, **others))
    with pytest.raises(ValueError, match="has a sliding window that it does not pass"):
        wrap(make_hf("starcoder2", sliding_window=40, head_dim=None))


def test_a_model_whose_attention_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = fallback._paged_attention
    monkeypatch.setattr(fallback, "_paged_attention", lambda *args, scaling=None, **others: attention(*args, scaling=0.1, **others))
    with pytest.raises(ValueError, match="gives other logits"):
        wrap(make_hf("cohere2"))
