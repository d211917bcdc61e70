"""Launches compiled in parallel, for a device that is not there, from tensors without numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton

from kernels.triton import tuning
from kernels.triton.ahead import Absent, compiling, share
from kernels.triton.gated_activation import gated_activation
from kernels.triton.rms_norm import _configs, rms_norm
from kernels.triton.target import Traits, processors
from tests.unit.kernels.triton.ahead_of_time import TARGETS

DEVICE = Absent(TARGETS["sm_90"], Traits(132, converts_fp8=True))
META = torch.device("meta")


def nothing(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device=META)


def walk() -> None:
    with tuning.every_candidate():
        for rows in (3, 5, 3):  # alike to the compiler
            rms_norm(nothing(rows, 512), nothing(512), 1e-6)
    gated_activation(nothing(3, 1024), "silu")


def binaries(folder: Path) -> set[Path]:
    return set(folder.rglob("*.cubin"))


def test_each_launch_is_compiled_by_one_process_and_found_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    candidates = len(list(_configs(512, 3)))
    assert candidates > 1
    assert share(walk, DEVICE, 300.0, 2) == candidates + 1
    assert len(binaries(tmp_path)) == candidates + 1
    before, seen = binaries(tmp_path), []
    with compiling(DEVICE, lambda kernel, made: seen.append(kernel.__name__)):
        walk()
    assert set(seen) == {"_rms_norm", "_gated"}
    assert binaries(tmp_path) == before


def test_what_does_not_compile_is_passed_over_and_a_late_process_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def broken() -> None:
        gated_activation(nothing(3, 1024).double(), "gelu")  # compiles
        rms_norm(nothing(3, 512).to(torch.complex64), nothing(512), 1e-6)
        gated_activation(nothing(3, 1024), "relu")

    share(broken, DEVICE, 300.0, 1)
    assert len(binaries(tmp_path)) == 2
    assert share(lambda: torch.multiprocessing.Event().wait(), DEVICE, 0.5, 2) == 0


def test_a_device_stands_in_only_while_it_is_compiled_for() -> None:
    with compiling(DEVICE, lambda *_: None):
        assert processors(META) == 132
    assert processors(torch.device("cpu")) != 132
