"""RMS normalisation on the device, with the residual addition before it where there is one: each row read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_COLUMNS = 1 << 16
"""A row is held in one program's registers."""


@triton.jit
def _rms_norm(x, residual, weight, out, total, stride_x, stride_residual, columns, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row * stride_x + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + row * stride_residual + offsets, mask=inside, other=0.0).to(tl.float32)
        # Rounded before it is normalised: later layers see the rounded sum.
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * columns + offsets, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    factors = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + offsets, (values * scale * factors).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.reference.rms_norm`. Raises ValueError for a weight of another length or rows over 65,536 columns."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.reference.add_rms_norm`. Raises ValueError as `rms_norm` does, and where x and residual differ in shape or dtype."""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} must be alike")
    return _launch(x, residual, weight, eps)


def _launch(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    columns = x.shape[-1]
    if weight.shape != (columns,):
        raise ValueError(f"weight must have shape ({columns},) like the rows of x, got {tuple(weight.shape)}")
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of at most {MAX_COLUMNS} columns fit one program, got {columns}")
    rows = _as_rows(x)
    other = rows if residual is None else _as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    if x.numel():
        block = triton.next_power_of_2(columns)
        # A warp for every 512 columns keeps 16-byte loads in flight without spilling.
        _rms_norm[(len(rows),)](
            rows, other, weight, out, total, rows.stride(0), other.stride(0), columns, float(eps), ADDS=residual is not None, BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out, total


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with columns side by side; a slice of wider rows stays where it is."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.reshape(-1, x.shape[-1]).contiguous()
