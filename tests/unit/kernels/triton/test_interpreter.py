"""The Triton ops themselves, through Triton's interpreter, against float64 references."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import kernels
from tests.unit.kernels.triton.cases import cases, check_refusals

ROOT = Path(__file__).parents[4]


def run_cases(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.kernels.triton.cases", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_case_equals_its_reference() -> None:
    counts = {op: int(count) for op, count in (line.split() for line in run_cases().splitlines())}
    refused = counts.pop("refusals")
    assert counts == Counter(case.op for case in cases(full=False))
    assert refused == 12


def test_no_case_is_passed_by_empty_kernels() -> None:
    assert run_cases("--hollow").split("\n") == [""]


def test_every_op_has_cases() -> None:
    covered = {case.op for case in cases(full=False)} | {"plan_attention", "paged_attention"}  # both are behind every attention case
    assert covered == set(kernels.TRITON_OPS)


@pytest.mark.parametrize("op", sorted(kernels.TRITON_OPS))
def test_every_listed_op_has_its_file_and_its_reference(op: str) -> None:
    assert (ROOT / "kernels" / "triton" / f"{kernels.TRITON_OPS[op]}.py").exists()
    assert op in kernels._REFERENCE_OPS


def test_refusals_are_counted_here_too() -> None:
    """The same checks without the interpreter: nothing is launched before they are made."""
    import torch

    assert check_refusals(torch.device("cpu")) == 12
