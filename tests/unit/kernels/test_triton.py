"""The Triton ops themselves, through Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from tests.unit.kernels.triton_cases import SHAPES

ROOT = Path(__file__).parents[3]


def test_triton_ops_equal_their_definitions_in_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.unit.kernels.triton_cases"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(len(SHAPES) * 5 + 2), "cases"]


@pytest.mark.parametrize("op", sorted(kernels.TRITON_OPS))
def test_every_listed_op_has_its_file_and_its_reference(op: str) -> None:
    assert (ROOT / "kernels" / "triton" / f"{kernels.TRITON_OPS[op]}.py").exists()
    assert op in kernels._REFERENCE_OPS
