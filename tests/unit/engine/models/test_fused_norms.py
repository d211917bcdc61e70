"""Residual additions on the norms after them, and per-head norms on the rotation: what the decoder does on a GPU, on a CPU."""

from __future__ import annotations

import pytest
import torch

import kernels
from engine.batch import NORMALISED
from engine.models.decoder import LeanDecoder
from tests.unit.engine.models.tiny import CHUNKED, Texts, make_hf, make_lean


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "granite"])
@pytest.mark.parametrize("taps", [(), (0, 2), (4,), (1, NORMALISED)])
def test_logits_and_taps_are_those_of_separate_ops(family: str, taps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_lean(make_hf(family))
    assert isinstance(model, LeanDecoder)
    fused = LeanDecoder(model.spec, model._arch, model._ropes, model._weights, fused_norms=True)
    texts = Texts.random(101)
    outputs = []
    additions = 0

    def add_rms_norm(*arguments, inner=kernels.add_rms_norm):
        nonlocal additions
        additions += 1
        return inner(*arguments)

    monkeypatch.setattr(kernels, "add_rms_norm", add_rms_norm)
    for decoder in (model, fused):
        kv = texts.pool(model.spec)
        outputs.append([decoder.forward(texts.step(spans, taps), kv) for spans in CHUNKED])
    assert additions == len(CHUNKED) * (1 if family == "olmo2" else 8), "two a layer; OLMo 2 has no norm after an addition but the last"
    for plain, other in zip(*outputs, strict=True):
        torch.testing.assert_close(other.logits, plain.logits, rtol=1e-4, atol=1e-4)
        assert other.taps.keys() == plain.taps.keys() == set(taps)
        for tap in taps:
            torch.testing.assert_close(other.taps[tap], plain.taps[tap], rtol=1e-4, atol=1e-4)
