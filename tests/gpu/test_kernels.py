"""The Triton ops on a GPU: `python -m pytest tests/gpu`, with torch, triton, transformers, safetensors, numpy and pytest alone."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.requirements import DEVICE, needs_gpu
from tests.unit.kernels.triton.cases import Case, cases, check_refusals

pytestmark = needs_gpu


@pytest.mark.parametrize("case", list(cases(full=True)), ids=lambda case: f"{case.op}-{case.name}")
def test_equals_its_reference(case: Case) -> None:
    torch.manual_seed(torch.seed() % 2**31)  # fresh inputs every time
    case.check(DEVICE)


def test_what_does_not_fit_is_refused() -> None:
    assert check_refusals(DEVICE) == 12
