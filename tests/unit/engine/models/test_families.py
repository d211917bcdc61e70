"""Each family's lean decoder against transformers on tiny random weights, and proof that each special feature matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.checkpoints import loader
from engine.models import families
from engine.models.families import FAMILIES, read_architecture
from tests.unit.engine.models.cases import GEMMA3_ROPE, LEAN, LONGROPE
from tests.unit.engine.models.tiny import CHUNKED, LENGTHS, ONE_SHOT, Texts, make_hf, make_lean, reference, run_steps, worst_gap

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=LEAN, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Texts, list[torch.Tensor]]:
    """(transformers model, lean decoder, texts, transformers' logits)"""
    model_type, changes = LEAN[request.param]
    hf = make_hf(model_type, **changes)
    texts = Texts.random(hf.config.vocab_size)
    return hf, make_lean(hf), texts, reference(hf, texts)


def test_every_family_has_a_case() -> None:
    assert {model_type for model_type, _ in LEAN.values()} == set(FAMILIES)


def test_packed_prefill_equals_transformers(pair: tuple[Any, Any, Texts, list[torch.Tensor]]) -> None:
    _, lean, texts, expected = pair
    assert worst_gap(run_steps(lean, texts, ONE_SHOT), expected) < TOLERANCE


def test_chunks_single_tokens_and_drafts_equal_transformers(pair: tuple[Any, Any, Texts, list[torch.Tensor]]) -> None:
    _, lean, texts, expected = pair
    assert worst_gap(run_steps(lean, texts, CHUNKED), expected) < TOLERANCE


def test_taps_are_transformers_hidden_states(pair: tuple[Any, Any, Texts, list[torch.Tensor]]) -> None:
    hf, lean, texts, expected = pair
    layers = hf.config.num_hidden_layers
    step = texts.step([(0, 0, LENGTHS[0])], taps=(0, 2, layers))
    step = replace(step, logit_rows=torch.tensor([4, LENGTHS[0] - 1]))
    out = lean.forward(step, texts.pool(lean.spec))
    with torch.inference_mode():
        hidden = hf(input_ids=texts.tokens[0][None], use_cache=False, output_hidden_states=True).hidden_states
        last = hf.model.norm(out.taps[layers])
    for tap in (0, 2):
        assert torch.allclose(out.taps[tap], hidden[tap][0], atol=TOLERANCE)
    assert torch.allclose(last, hidden[-1][0], atol=TOLERANCE), "the last tap is the residual stream before the final norm"
    assert torch.allclose(out.logits, expected[0][[4, -1]], atol=TOLERANCE)


def test_rows_without_logits_are_written_too() -> None:
    """A prefill chunk may want no logits at all; its keys and values must be there for the next step."""
    hf = make_hf("llama")
    lean, texts = make_lean(hf), Texts.random(101)
    pool = texts.pool(lean.spec)
    silent = lean.forward(replace(texts.step([(0, 0, 20)]), logit_rows=torch.empty(0, dtype=torch.int64)), pool)
    spoken = lean.forward(texts.step([(0, 20, 23)]), pool)
    assert silent.logits.shape == (0, 101)
    assert torch.allclose(spoken.logits, reference(hf, texts)[0][20:], atol=TOLERANCE)


_FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2's window": ("qwen2", {"window": "none"}),
    "mistral's window": ("mistral", {"window": "none"}),
    "qwen3's norm of queries and keys": ("qwen3", {"qk_norm": "none"}),
    "gemma's offset norms": ("gemma", {"unit_offset": False}),
    "gemma's embedding scale": ("gemma", {"scaled_embedding": False}),
    "gemma2's soft caps": ("gemma2", {"soft_capped": False}),
    "gemma3's window": ("gemma3", {"window": "none"}),
    "gemma3's norm after attention": ("gemma3", {"attention_norms": ("input_layernorm", None)}),
    "gemma3's norm after the MLP": ("gemma3", {"mlp_norms": ("pre_feedforward_layernorm", None)}),
    "gemma2's window": ("gemma2", {"window": "none"}),
    "gemma2's norm after attention": ("gemma2", {"attention_norms": ("input_layernorm", None)}),
    "gemma3's norm of queries and keys": ("gemma3", {"qk_norm": "none"}),
    "gemma3's offset norms": ("gemma3", {"unit_offset": False}),
    "gemma3's embedding scale": ("gemma3", {"scaled_embedding": False}),
    "phi3's window": ("phi3", {"window": "none"}),
    "olmo2's norm over all heads": ("olmo2", {"qk_norm": "none"}),
    "granite's factors": ("granite", {"multipliers": False}),
}
_DROPPED = ("q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm")


@pytest.mark.parametrize("feature", _FEATURES)
def test_without_its_feature_a_family_is_wrong(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, change = _FEATURES[feature]
    model_type, values = LEAN[case]
    hf = make_hf(model_type, **values)
    texts = Texts.random(hf.config.vocab_size)
    monkeypatch.setitem(families.FAMILIES, model_type, replace(FAMILIES[model_type], **change))
    lean = _make_lean_ignoring(hf, _DROPPED if {"qk_norm", "attention_norms", "mlp_norms"} & change.keys() else ())
    assert worst_gap(run_steps(lean, texts, ONE_SHOT), reference(hf, texts)) > 100 * TOLERANCE


def _make_lean_ignoring(hf: Any, dropped: tuple[str, ...]) -> Any:
    """As `make_lean`, without complaint about norms that the crippled family no longer takes."""
    from engine.models import weights

    class Lenient(dict[str, torch.Tensor]):
        def __bool__(self) -> bool:
            return any(not any(part in name for part in dropped) for name in self)

    original = weights.pack_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "pack_weights", lambda tensors, *args, **kw: original(Lenient(tensors), *args, **kw))
        return make_lean(hf)


_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2's scale of queries": ("gemma2", {"attention_scale": 8**-0.5}),
    "gemma2's soft cap of scores": ("gemma2", {"attention_soft_cap": None}),
    "gemma2's soft cap of logits": ("gemma2", {"logit_soft_cap": None}),
    "gemma3's scale of queries": ("gemma3", {"attention_scale": 8**-0.5}),
    "granite's embedding factor": ("granite", {"embedding_scale": 1.0}),
    "granite's residual factor": ("granite", {"residual_scale": 1.0}),
    "granite's attention factor": ("granite", {"attention_scale": 8**-0.5}),
    "granite's logits factor": ("granite", {"logit_scale": 1.0}),
    "gemma's activation": ("gemma", {"activation": "silu"}),
}


@pytest.mark.parametrize("feature", _VALUES)
def test_without_its_value_a_family_is_wrong(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, change = _VALUES[feature]
    model_type, values = LEAN[case]
    hf = make_hf(model_type, **values)
    texts = Texts.random(hf.config.vocab_size)
    monkeypatch.setattr(loader, "read_architecture", lambda config: replace(read_architecture(config), **change))
    assert worst_gap(run_steps(make_lean(hf), texts, ONE_SHOT), reference(hf, texts)) > 100 * TOLERANCE


def _swapped(ropes: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": ropes["sliding_attention"], "sliding_attention": ropes["full_attention"]}


def _plain(ropes: dict[str, Any]) -> dict[str, Any]:
    default = 1.0 / (100.0 ** (torch.arange(0, 8, 2) / 8))
    return {name: replace(rope, inv_freq=default[: len(rope.inv_freq)], scaling=1.0) for name, rope in ropes.items()}


def _unscaled(ropes: dict[str, Any]) -> dict[str, Any]:
    return {name: replace(rope, scaling=1.0) for name, rope in ropes.items()}


def _whole_head(ropes: dict[str, Any]) -> dict[str, Any]:
    return {name: replace(rope, inv_freq=1.0 / (100.0 ** (torch.arange(0, 8, 2) / 8))) for name, rope in ropes.items()}


def _narrower(ropes: dict[str, Any]) -> dict[str, Any]:
    return {name: replace(rope, inv_freq=rope.inv_freq[:1]) for name, rope in ropes.items()}


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("gemma3", _swapped),
        ("llama, llama3 rope", _plain),
        ("llama, linear rope", _plain),
        ("llama, yarn rope", _plain),
        ("llama, yarn rope", _unscaled),
        ("phi3", _whole_head),
        ("phi3", _narrower),
        ("phi3, longrope", _plain),
        ("phi3, longrope", _unscaled),
    ],
)
def test_with_other_angles_a_family_is_wrong(case: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    model_type, values = LEAN[case]
    hf = make_hf(model_type, **values)
    texts, lean = Texts.random(hf.config.vocab_size), make_lean(hf)
    lean._ropes = change(lean._ropes)
    assert worst_gap(run_steps(lean, texts, ONE_SHOT), reference(hf, texts)) > 100 * TOLERANCE


def test_rotating_a_layer_without_rope_is_wrong() -> None:
    model_type, values = LEAN["smollm3"]
    hf = make_hf(model_type, **values)
    lean, texts = make_lean(hf), Texts.random(hf.config.vocab_size)
    lean._arch = replace(lean._arch, layers=tuple(replace(layer, rope="all") for layer in lean._arch.layers))
    assert worst_gap(run_steps(lean, texts, ONE_SHOT), reference(hf, texts)) > 100 * TOLERANCE


def test_context_ends_where_longrope_would_switch() -> None:
    """Beyond its original length, transformers turns *all* positions by other angles; keys that are cached cannot follow."""
    model_type, values = LEAN["phi3, longrope"]
    hf = make_hf(model_type, **values)
    assert hf.config.max_position_embeddings == 64
    assert make_lean(hf).spec.max_positions == 32
    with torch.inference_mode():
        short, long = (hf(input_ids=torch.arange(length)[None], use_cache=False).logits[0, :32] for length in (32, 33))
    assert worst_gap([short], [long]) > 100 * TOLERANCE


def test_context_ends_where_a_rope_of_some_layers_would_switch() -> None:
    config = make_hf("gemma3_text", rope_parameters={**GEMMA3_ROPE, "full_attention": LONGROPE}).config
    assert families.max_positions(config) == 32


def test_unknown_layer_kinds_and_activations_are_refused_by_name() -> None:
    config = make_hf("qwen3").config
    config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(ValueError, match="layer 1 is of type 'chunked_attention'"):
        families.read_architecture(config)
    config = make_hf("llama").config
    config.hidden_act = "tanh"
    with pytest.raises(ValueError, match="activation 'tanh'"):
        families.read_architecture(config)
