"""The Triton ops on a GPU: `python -m pytest tests/gpu`, with torch, triton, numpy and pytest alone."""

from __future__ import annotations

import pytest
import torch

from tests.unit.kernels.triton_cases import SHAPES, check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and torch's CUDA build (make TORCH=cuda)")


def test_triton_ops_equal_their_definitions() -> None:
    assert check("cuda") == len(SHAPES) * 5 + 2
