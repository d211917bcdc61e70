"""Matrix products with weights laid out once, at load; on request as eight-bit integers with a scale for each output.

In float32 on a CPU the products are compiled kernels (`kernels.native.linear`). Where those cannot run, and in bfloat16, oneDNN's blocked
weight layout is worth the second copy: all products of a 135M-parameter Llama took 102 ms at 64 rows against 198 ms through torch's plain
linear (2 cores, AVX-512, float32), and 23 against 64 ms at 4 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from kernels import native, pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kernels.native.screen import Screen

Layout = Literal["rows", "onednn", "panels", "gated panels"]

_AT_ONCE = 1 << 16
"""Numbers of a weight that are cast or rounded at a time. A few hundred KB stay in a processor's cache, and it hardly matters that
something small that stays takes their place afterwards: the C library's allocator then has no room there for the next ones.
"""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [out_features, in_features] in the layout its device multiplies fastest, and its bias [out_features].

    `gated panels`: gate and up interleaved, for `gated_linear` alone. A weight of int8 is to be multiplied with its `scales` (one an
    output, in the order of the layout); inputs, sums and results stay in their own type. screen: what `kernels.linear_peaks`
    rules outputs out by.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    out_features: int
    layout: Layout
    scales: torch.Tensor | None = None
    screen: Screen | None = None


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> int8 [out, in] and scales [out] of the weight's type: the nearest of 255 steps to the largest number of its row."""
    return _stack_rounded([weight.detach()], weight.dtype)


def pack_linear(
    weight: torch.Tensor | Sequence[torch.Tensor],
    bias: torch.Tensor | None = None,
    *,
    int8: bool = False,
    dtype: torch.dtype | None = None,
    screened: bool = False,
) -> PackedLinear:
    """Packs `weight` [out, in], or several that are stacked along their outputs, in `dtype` (None: its own).

    Several are taken up piece by piece, and the result owns its memory: at no time there is more than a piece besides it.
    screened: where there is a way, it is kept a second time in eight bits, for `kernels.linear_peaks`.
    """
    pieces = [weight] if isinstance(weight, torch.Tensor) else weight
    kind, device = dtype or pieces[0].dtype, pieces[0].device
    columns, depth = sum(map(len, pieces)), pieces[0].shape[1]
    if native.takes_weight(kind, device):
        from kernels.native import linear as compiled

        panels = compiled.empty_panels(columns, depth, torch.int8 if int8 else kind)
        scales = _fill(partial(compiled.write, panels), pieces, kind, int8=int8)
        padded_bias, padded_scales = (None if numbers is None else compiled.pad_outputs(numbers) for numbers in (bias, scales))
        screen = _screen(panels, columns) if screened and bias is None and scales is None else None
        return PackedLinear(panels, padded_bias, columns, "panels", padded_scales, screen)
    if int8:
        numbers, scales = _stack_rounded(pieces, kind)
        return PackedLinear(numbers, bias, columns, "rows", scales)
    stacked = weight.to(kind).contiguous() if isinstance(weight, torch.Tensor) else _stack(pieces, kind)
    if _can_block(stacked):
        return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(stacked, None), bias, columns, "onednn")
    return PackedLinear(stacked, bias, columns, "rows")


def pack_gated_linear(
    weight: torch.Tensor | Sequence[torch.Tensor], activation: str, *, int8: bool = False, dtype: torch.dtype | None = None
) -> PackedLinear:
    """As `pack_linear`, for `gated_linear` with this activation. weight: gate (above) and up (below) [2 * out, in], or the two of them."""
    gate, up = weight.chunk(2) if isinstance(weight, torch.Tensor) else weight
    kind = dtype or gate.dtype
    if native.takes_gated(gate, kind, activation):
        from kernels.native import linear as compiled

        panels = compiled.empty_panels(2 * len(gate), gate.shape[1], torch.int8 if int8 else kind)
        halves = zip(compiled.halves(panels), (gate, up), strict=True)
        scales = [_fill(partial(compiled.write, half), [piece], kind, int8=int8) for half, piece in halves]
        known = [numbers for numbers in scales if numbers is not None]
        return PackedLinear(panels, None, 2 * len(gate), "gated panels", compiled.pair_gated(*known) if known else None)
    return pack_linear([gate, up], int8=int8, dtype=dtype)


def _screen(panels: torch.Tensor, columns: int) -> Screen | None:
    from kernels.native import screen

    return screen.screen(panels, columns) if screen.fits(panels.shape[1]) else None


def _stack(pieces: Sequence[torch.Tensor], kind: torch.dtype) -> torch.Tensor:
    """[out, in]. On a CPU as pages of its own, which go back to the system where it is packed further: the allocator keeps what it gets."""
    shape, device = (sum(map(len, pieces)), pieces[0].shape[1]), pieces[0].device
    stacked = pages.zeros(shape, kind) if device.type == "cpu" else torch.empty(shape, dtype=kind, device=device)
    _fill(partial(_write, stacked), pieces, kind)
    return stacked


def _stack_rounded(pieces: Sequence[torch.Tensor], kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [out, in], and scales [out]."""
    numbers = torch.empty(sum(map(len, pieces)), pieces[0].shape[1], dtype=torch.int8, device=pieces[0].device)
    scales = _fill(partial(_write, numbers), pieces, kind, int8=True)
    assert scales is not None
    return numbers, scales


def _write(stacked: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    stacked[first : first + len(rows)] = rows


def _fill(
    write: Callable[[int, torch.Tensor], None], pieces: Sequence[torch.Tensor], kind: torch.dtype, *, int8: bool = False
) -> torch.Tensor | None:
    """Has the rows of `pieces` written in `kind`, or rounded to eight bits: then their scales come back."""
    first, scales = 0, []
    for piece in pieces:
        changes = int8 or piece.dtype != kind
        for stored in piece.split(max(_AT_ONCE // max(piece.shape[1], 1), 1) if changes else max(len(piece), 1)):
            rows = stored.to(kind)
            if int8:
                scale = rows.abs().amax(dim=1).clamp_(min=torch.finfo(kind).tiny).div_(127)
                rows = (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
                scales.append(scale)
            write(first, rows)
            first += len(rows)
    return torch.cat(scales) if scales else None


def linear(x: torch.Tensor, packed: PackedLinear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in] @ weight.T (+ bias) (+ residual [T, out]), as one product with the additions fused into it."""
    if packed.layout == "rows":
        if packed.scales is None:
            y = functional.linear(x, packed.weight, packed.bias)
        else:
            y = functional.linear(x, packed.weight.to(x.dtype)) * packed.scales
            y = y if packed.bias is None else y.add_(packed.bias)
        return y if residual is None else y.add_(residual)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    if packed.layout == "panels":
        from kernels.native import linear as compiled

        return compiled.product(x, packed.weight, packed.out_features, packed.bias, residual, packed.scales)
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed.weight, packed.bias, "add")


def _can_block(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
