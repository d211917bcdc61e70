"""All layers in one call: the same numbers as kernel by kernel, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import NORMALISED, Peaks
from engine.models import few_rows
from engine.models.decoder import LeanDecoder
from engine.models.few_rows import FewRows
from kernels import native
from tests.unit.engine.models import tiny
from tests.unit.engine.models.tiny import CHUNKED, Texts, make_hf, make_lean

pytestmark = pytest.mark.skipif(not native.available(), reason="this processor has no compiled kernels")

SHAPE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 80}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True}),
    "window": ("mistral", {"sliding_window": 6}),
    "layers without rope": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False}),
    "two windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    ),
    "scales": ("granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.0}),
}


def decoder(model_type: str, **changes: Any) -> LeanDecoder:
    model = make_lean(make_hf(model_type, **SHAPE | changes))
    assert isinstance(model, LeanDecoder)
    assert model._few_rows is not None
    return model


def compare(model: LeanDecoder, texts: Texts, steps: list[list[tuple[int, int, int]]], monkeypatch: Any, taps: tuple[int, ...] = ()) -> int:
    """Runs the steps either way; returns how many were run at once."""
    outputs, at_once = [], 0
    run = FewRows.run

    def counted(self: FewRows, *arguments: Any) -> Any:
        nonlocal at_once
        result = run(self, *arguments)
        at_once += result is not None
        return result

    monkeypatch.setattr(FewRows, "run", counted)
    fast = model._few_rows
    for few in (None, fast):
        kv = texts.pool(model.spec)
        monkeypatch.setattr(model, "_few_rows", few)
        outputs.append([model.forward(texts.step(spans, taps), kv) for spans in steps])
    for expected, found in zip(*outputs, strict=True):
        assert torch.equal(found.logits, expected.logits)
        assert found.taps.keys() == expected.taps.keys() == set(taps)
        assert all(torch.equal(found.taps[tap], expected.taps[tap]) for tap in taps)
    return at_once


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("taps", [(), (0, 2), (1, 4), (3, NORMALISED)])
def test_steps_are_those_of_single_kernels(case: str, taps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "BLOCK_SIZE", 16)
    model_type, changes = CASES[case]
    model = decoder(model_type, **changes)
    assert compare(model, Texts.random(101), CHUNKED, monkeypatch, taps) == len(CHUNKED)


def test_a_shared_prefix_is_read_in_a_wave_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "BLOCK_SIZE", 16)
    texts = Texts.random(101, (200, 190, 180))
    for other in (1, 2):
        texts.tables[other, :8] = texts.tables[0, :8]
        texts.tokens[other][:128] = texts.tokens[0][:128]
    model = decoder("llama", max_position_embeddings=256)
    steps = [[(0, 0, 100)], [(0, 100, 199)], [(1, 128, 189), (2, 128, 179)], [(0, 199, 200), (1, 189, 190), (2, 179, 180)]]
    assert compare(model, texts, steps, monkeypatch) == len(steps)
    monkeypatch.setattr(few_rows, "_MOST_WAVES", 1)
    assert compare(model, texts, steps, monkeypatch) == len(steps) - 1, "more waves than a table has room for"


def test_another_cache_is_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "BLOCK_SIZE", 16)
    model, texts = decoder("llama"), Texts.random(101)
    first, second = texts.pool(model.spec), texts.pool(model.spec)
    for kv in (first, second):
        for spans in CHUNKED:
            model.forward(texts.step(spans), kv)
    assert all(torch.equal(one, other) for one, other in zip(first.keys, second.keys, strict=True))
    assert first.keys[0].abs().sum() > 0


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo2", "qwen3"])
def test_other_builds_run_kernel_by_kernel(model_type: str) -> None:
    model = make_lean(make_hf(model_type, **SHAPE))
    assert isinstance(model, LeanDecoder)
    assert model._few_rows is None


def test_a_step_of_many_rows_or_of_few_wanted_ones_runs_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "BLOCK_SIZE", 16)
    model, texts = decoder("llama", max_position_embeddings=256), Texts.random(101, (200,))
    assert compare(model, texts, [[(0, 0, few_rows.MOST_ROWS + 1)], [(0, few_rows.MOST_ROWS + 1, 200)]], monkeypatch) == 1
    step = texts.step([(0, 0, 40)])
    kv = texts.pool(model.spec)
    monkeypatch.setattr(FewRows, "run", lambda *_: pytest.fail("ran at once"))
    object.__setattr__(step, "logit_rows", torch.from_numpy(np.array([39])))
    assert len(model.forward(step, kv).logits) == 1


@pytest.mark.parametrize("case", ["biases", "scales"])
@pytest.mark.parametrize("taps", [(), (3, NORMALISED)])
def test_peaks_alone_are_those_of_the_logits(case: str, taps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What scales logits is no reason to compute them all, but what it rounds could be equal afterwards: there all are computed."""
    monkeypatch.setattr(tiny, "BLOCK_SIZE", 16)
    model_type, changes = CASES[case]
    model, texts = decoder(model_type, **changes), Texts.random(101)
    for few in (model._few_rows, None):
        monkeypatch.setattr(model, "_few_rows", few)
        whole, alone = texts.pool(model.spec), texts.pool(model.spec)
        for spans in CHUNKED:
            step = texts.step(spans, taps)
            expected, found = model.forward(step, whole), model.forward(replace(step, peaks=True), alone)
            assert (found.peaks is None) == (case == "scales")
            peaks = found.peaks or Peaks.of(found.logits)
            assert torch.equal(peaks.values, expected.logits.amax(1))
            assert torch.equal(peaks.tokens, expected.logits.argmax(1))
            assert all(torch.equal(found.taps[tap], expected.taps[tap]) for tap in taps)
