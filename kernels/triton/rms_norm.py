"""RMS normalisation on the device, with the residual addition before it where there is one: each row read once and written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.triton import tuning

if TYPE_CHECKING:
    from collections.abc import Iterator

_MANY = 1024
"""Rows from which on the device is full, and what counts is how many bytes are on their way."""
MAX_COLUMNS = 1 << 16
"""A row is held in one program's registers."""


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x, residual, weight, out, total, stride_x, stride_residual, rows, columns, eps, ADDS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = tl.arange(0, BLOCK)[None, :]
    at_x, at_residual, at_out = (
        row[:, None] * stride_x + offsets,
        row[:, None] * stride_residual + offsets,
        row[:, None] * columns + offsets,
    )
    inside = (row < rows)[:, None] & (offsets < columns)
    if EVEN:
        values = tl.load(x + at_x).to(tl.float32)
        factors = tl.load(weight + offsets).to(tl.float32)
    else:
        values = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
        factors = tl.load(weight + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    if ADDS:
        if EVEN:
            values += tl.load(residual + at_residual).to(tl.float32)
        else:
            values += tl.load(residual + at_residual, mask=inside, other=0.0).to(tl.float32)
        # Rounded before it is normalised: later layers see the rounded sum.
        rounded = values.to(total.dtype.element_ty)
        if EVEN:
            tl.store(total + at_out, rounded)
        else:
            tl.store(total + at_out, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / columns + eps)
    normed = (values * scale[:, None] * factors).to(out.dtype.element_ty)
    if EVEN:
        tl.store(out + at_out, normed)
    else:
        tl.store(out + at_out, normed, mask=inside)


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
        count = len(rows)

        def launch(config: tuning.Config) -> None:
            height = config["ROWS"]
            _rms_norm[(triton.cdiv(count, height),)](
                rows, other, weight, out, total, rows.stride(0), other.stride(0), count, columns, float(eps), ADDS=residual is not None,
                EVEN=columns == block and count % height == 0, ROWS=height, BLOCK=block, num_warps=config["num_warps"],
            )  # fmt: skip

        key = f"{columns}/{'many' if count >= _MANY else 'few'}/{str(x.dtype)[6:]}/{'adds' if residual is not None else 'plain'}"
        tuning.run("rms_norm", key, x.device, list(_configs(block, count)), launch)
    return out, total


def _configs(block: int, rows: int) -> Iterator[tuning.Config]:
    """A thread holds 16 numbers, two 16-byte loads of half precision: short rows (per-head norms) share a program."""
    height = min(max(2048 // block, 1), triton.next_power_of_2(rows)) if rows >= _MANY else 1
    warps = min(max(block * height // 512, 1), 16)
    yield {"ROWS": height, "num_warps": warps}
    for factor in (2, 4):
        if warps * factor <= 16:
            yield {"ROWS": height, "num_warps": warps * factor}
    if warps > 1:
        yield {"ROWS": height, "num_warps": warps // 2}
    if rows >= _MANY and block * height <= 8192:
        yield {"ROWS": 2 * height, "num_warps": warps}


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with columns side by side; a slice of wider rows stays where it is."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.reshape(-1, x.shape[-1]).contiguous()
