"""Every Triton op on shapes ordinary and odd: `cases(full=False)` for the interpreter, `full=True` for a device."""

from __future__ import annotations

from collections.abc import Iterator

from kernels.testing import Case
from tests.unit.kernels.triton.cases.attention import attention_cases
from tests.unit.kernels.triton.cases.drafting import budget_cases, head_cases
from tests.unit.kernels.triton.cases.fp8_linear import fp8_cases
from tests.unit.kernels.triton.cases.kv_write import kv_cases
from tests.unit.kernels.triton.cases.refusals import check_refusals
from tests.unit.kernels.triton.cases.rows import row_cases
from tests.unit.kernels.triton.cases.vocabulary import vocabulary_cases

__all__ = ["Case", "cases", "check_refusals"]


def cases(*, full: bool) -> Iterator[Case]:
    for family in (attention_cases, kv_cases, row_cases, vocabulary_cases, head_cases, fp8_cases, budget_cases):
        yield from family(full=full)
