"""RMS normalisation on the device: one program a row, the row read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_COLUMNS = 1 << 16
"""A row is held in one program's registers."""


@triton.jit
def _rms_norm(x, weight, out, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    factors = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + offsets, (values * scale * factors).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.reference.rms_norm`. Raises ValueError for a weight of another length or rows over 65,536 columns."""
    columns = x.shape[-1]
    if weight.shape != (columns,):
        raise ValueError(f"weight must have shape ({columns},) like the rows of x, got {tuple(weight.shape)}")
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of at most {MAX_COLUMNS} columns fit one program, got {columns}")
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        block = triton.next_power_of_2(columns)
        # A warp for every 512 columns keeps 16-byte loads in flight without spilling.
        _rms_norm[(x.numel() // columns,)](x, weight, out, columns, eps, BLOCK=block, num_warps=min(max(block // 512, 1), 16))
    return out
