"""Block-scaled FP8 checkpoints: widened at load on a CPU, kept as stored where products can use them so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints import load_model, loader
from engine.checkpoints.fp8 import take_scales
from kernels.reference.fp8_linear import Fp8Linear, dequantise
from tests.unit.engine.checkpoints.test_loader import edit, edit_config, folder
from tests.unit.engine.models.tiny import ONE_SHOT, Texts, run_steps, worst_gap

__all__ = ["folder"]

BLOCK = (16, 128)
CONFIG = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}


@pytest.fixture
def pair(folder: Path) -> tuple[Path, Path]:
    """An FP8 checkpoint, and one of the numbers that it stands for."""
    from shutil import copytree

    wide = copytree(folder, folder.with_name("wide"))

    def store(tensors: dict[str, torch.Tensor], *, widened: bool) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name]
            scale = torch.linspace(0.01, 0.03, -(-weight.shape[0] // BLOCK[0]))[:, None]
            stored = (weight / scale.repeat_interleave(BLOCK[0], 0)[: len(weight)]).to(torch.float8_e4m3fn)
            if widened:
                tensors[name] = dequantise(stored, scale, BLOCK, torch.float32)
            else:
                tensors[name], tensors[f"{name}_scale_inv"] = stored, scale

    edit(folder, lambda tensors: store(tensors, widened=False))
    edit(wide, lambda tensors: store(tensors, widened=True))
    edit_config(folder, quantization_config=CONFIG)
    return folder, wide


@pytest.mark.parametrize("keep", [False, True])
def test_it_computes_what_its_numbers_stand_for(pair: tuple[Path, Path], keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts.random(250)
    expected = run_steps(load_model(str(pair[1])).model, texts, ONE_SHOT)
    kept: list[Any] = []
    if keep:  # as on a GPU
        monkeypatch.setattr(loader, "multiplies_fp8", lambda device: True)
        monkeypatch.setattr(Fp8Linear, "__post_init__", lambda self: kept.append(self))
    found = run_steps(load_model(str(pair[0])).model, texts, ONE_SHOT)
    assert worst_gap(found, expected) < 2e-5
    assert len(kept) == (8 if keep else 0), "four products in each of two layers"


def test_weights_and_scales_must_pair_up() -> None:
    weight = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"do not pair up: a\.weight"):
        take_scales({"a.weight": weight}, CONFIG)
    with pytest.raises(ValueError, match=r"do not pair up: b\.weight"):
        take_scales({"b.weight_scale_inv": torch.ones(1, 1)}, CONFIG)


def test_other_kinds_of_fp8_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"stored quantised \(fp8\)"):
        load_model(str(folder))
