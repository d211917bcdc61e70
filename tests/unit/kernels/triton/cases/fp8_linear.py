"""Products with weights of eight bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kernels.testing import TOLERANCES, Case, poisoned_allocations
from tests.unit.kernels.triton.cases.common import HALF_TYPES, Results


def fp8_cases(*, full: bool) -> Iterator[Case]:
    shapes = [(3, 256, 150, (128, 128)), (17, 100, 40, (1, 100)), (40, 200, 70, (70, 200))]
    if full:
        shapes += [(1, 4096, 4096, (128, 128)), (64, 4096, 12288, (128, 128)), (700, 2560, 1000, (1, 2560))]
    for rows, depth, columns, block in shapes:
        for dtype in (torch.float32, *HALF_TYPES) if full or rows == 3 else (torch.float16,):
            run = partial(_fp8_linear, rows, depth, columns, block, dtype)
            yield Case("fp8_linear", f"{rows}x{depth}x{columns} in {block}, {str(dtype)[6:]}", run, TOLERANCES[dtype])


def _fp8_linear(rows: int, depth: int, columns: int, block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.reference.fp8_linear import Fp8Linear
    from kernels.reference.fp8_linear import fp8_linear as reference
    from kernels.triton.fp8_linear import fp8_linear

    weight = torch.randn(columns, depth, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-columns // block[0]), -(-depth // block[1]), device=device) + 0.5
    x, bias, residual = (torch.randn(*shape, device=device).to(dtype) for shape in ((rows, depth), (columns,), (rows, columns)))
    exact = reference(x.double(), Fp8Linear(weight, scale, block, bias.double()), residual.double())
    with poisoned_allocations():
        made = fp8_linear(x, Fp8Linear(weight, scale, block, bias), residual)
    return (made,), (exact,)
