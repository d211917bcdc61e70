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


PARTS = 2
"""Processes that share the cases: an interpreted kernel has one core."""


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What the runs print, by argument. All run at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.kernels.triton.interpreted"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    arguments = [*(f"--part={part}/{PARTS}" for part in range(PARTS)), "--hollow"]
    running = {argument: subprocess.Popen([*command, argument], cwd=ROOT, env=environment, **pipes) for argument in arguments}
    found = {}
    for argument, process in running.items():
        found[argument], errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    return found


def test_every_case_equals_its_reference(outputs: dict[str, str]) -> None:
    counts: Counter[str] = Counter()
    for part in range(PARTS):
        counts.update({op: int(count) for op, count in (line.split() for line in outputs[f"--part={part}/{PARTS}"].splitlines())})
    refused = counts.pop("refusals")
    assert counts == Counter(case.op for case in cases(full=False))
    assert refused == 12 * PARTS


def test_no_case_is_passed_by_empty_kernels(outputs: dict[str, str]) -> None:
    assert outputs["--hollow"] == ""


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
