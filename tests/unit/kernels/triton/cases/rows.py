"""What works on hidden states row by row: norms and gated activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kernels.testing import TOLERANCES, Case, poisoned_allocations
from tests.unit.kernels.triton.cases.common import HALF_TYPES, Results


def row_cases(*, full: bool) -> Iterator[Case]:
    shapes = [(1, 1), (3, 7), (5, 576), (2, 1000), *(((4096, 4096), (33, 12288), (7, 65536)) if full else ())]
    for rows, columns in shapes:
        for dtype in (torch.float32, *HALF_TYPES) if full or columns == 7 else (torch.float32,):
            name = f"{rows}x{columns}, {str(dtype)[6:]}"
            yield Case("rms_norm", name, partial(_rms_norm, rows, columns, dtype), TOLERANCES[dtype])
            yield Case("add_rms_norm", name, partial(_add_rms_norm, rows, columns, dtype), TOLERANCES[dtype])
            if not full and columns == 7:  # rows that share a program, as they do where there are many
                yield Case("rms_norm", f"many rows, {name}", partial(_rms_norm, 1030, 24, dtype), TOLERANCES[dtype])
                yield Case("add_rms_norm", f"many rows, {name}", partial(_add_rms_norm, 1024, 32, dtype), TOLERANCES[dtype])
            for activation in ("silu", "gelu", "gelu_tanh", "relu") if columns <= 12288 else ():
                run = partial(_gated_activation, rows, columns, dtype, activation)
                # 1 + erf(gate) cancels where the gate is far below zero: the error is that of numbers of order 1, however small the result
                yield Case("gated_activation", f"{activation} {name}", run, TOLERANCES[dtype], least=1.0)


def _rms_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.triton.rms_norm import rms_norm

    x, weight = torch.randn(rows, columns + 3, device=device).to(dtype)[:, 3:], torch.randn(columns, device=device).to(dtype)
    with poisoned_allocations():
        made = rms_norm(x, weight, 1e-5)
    return (made,), (torch.rms_norm(x.double(), (columns,), weight.double(), 1e-5),)


def _add_rms_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.triton.rms_norm import add_rms_norm

    x, residual = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(columns, device=device).to(dtype)
    with poisoned_allocations():
        made = add_rms_norm(x, residual, weight, 1e-5)
    total = x.double() + residual.double()
    return made, (torch.rms_norm(total, (columns,), weight.double(), 1e-5), total)


def _gated_activation(rows: int, columns: int, dtype: torch.dtype, activation: str, device: torch.device) -> Results:
    from kernels.reference.gated_activation import ACTIVATIONS
    from kernels.triton.gated_activation import gated_activation

    gate_up = 3 * torch.randn(rows, 2 * columns, device=device).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    with poisoned_allocations():
        made = gated_activation(gate_up, activation)
    return (made,), (ACTIVATIONS[activation](gate) * up,)
