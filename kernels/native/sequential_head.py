"""The sequential head where it drafts the likeliest token: bias, choice and log-sum-exp of a position in one pass over the vocabulary.

`kernels.reference.sequential_head` writes the bias of every token, adds the logits, and looks through the sum three times.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from kernels.native.emit import I32
from kernels.native.jit import Kernel, build, lanes, threads_for
from kernels.native.linear import Product, panel_width
from kernels.reference.sequential_head import DraftBlock, check_block, mix

if TYPE_CHECKING:
    from llvmlite import ir

    from kernels.native.emit import Emitter
    from kernels.reference.linear import PackedLinear
    from kernels.reference.sequential_head import SequentialHead

_GROUP = 4
"""Panels that a thread takes at a time."""


def takes(logits: torch.Tensor, head: SequentialHead) -> bool:
    """Whether a block of logits [S, K, V_d] can be drafted here: float32, rows contiguous, and w2 in panels that are all full."""
    packed = head.packed_w2
    if packed is None or packed.layout != "panels" or packed.bias is not None or logits.dtype != torch.float32 or logits.stride(2) != 1:
        return False
    return packed.out_features % panel_width() == 0 and head.w1 is not None and head.w1.dtype == torch.float32 and logits.dim() == 3


def sequential_head(logits: torch.Tensor, hidden: torch.Tensor | None, anchors: torch.Tensor, head: SequentialHead) -> DraftBlock:
    """`kernels.reference.sequential_head` of greedy rows, without the weights."""
    check_block(logits, hidden, head, None, None)
    packed, w1 = head.packed_w2, head.w1
    assert packed is not None
    assert w1 is not None
    state: torch.Tensor | None = torch.zeros(len(anchors), head.rank, dtype=w1.dtype)
    previous = anchors
    tokens, lses, peaks = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    confidences: list[torch.Tensor] = []
    for k in range(logits.shape[1]):
        embedding, state, confidence = mix(head, previous, state, None if hidden is None else hidden[:, k])
        assert embedding is not None
        columns, highest, lse = likeliest(logits[:, k], embedding.contiguous(), packed)
        previous = columns if head.token_ids is None else head.token_ids[columns]
        tokens.append(previous)
        lses.append(lse)
        peaks.append(highest - lse)
        if confidence is not None:
            confidences.append(confidence)
    sure = torch.stack(confidences, 1) if confidences else None
    return DraftBlock(torch.stack(tokens, 1), torch.stack(lses, 1), torch.stack(peaks, 1), sure, None)


def likeliest(logits: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits [S, V] + x [S, r] @ weight.T: the first column of the highest, int64 [S], the highest and the log-sum-exp, float32 [S]."""
    rows, panels = len(x), packed.weight.shape[0]
    highs, sums = x.new_empty(2, rows, panels)
    places = torch.empty(rows, panels, dtype=torch.int32)
    threads = threads_for(x.numel() * packed.out_features // 8)
    scales = 0 if packed.scales is None else packed.scales.data_ptr()
    _kernel(packed.scales is not None)(
        threads, x.data_ptr(), x.stride(0), rows, x.shape[1], packed.weight.data_ptr(), panels, 0, logits.stride(0), 0, logits.data_ptr(),
        scales, _GROUP, 0, highs.data_ptr(), sums.data_ptr(), places.data_ptr(),
    )  # fmt: skip
    highest, panel = highs.max(1)  # the first of equal ones
    lse = highest + (sums * (highs - highest[:, None]).exp_()).sum(1).log_()
    # A row that is no number has its highest nowhere.
    return places.gather(1, panel[:, None])[:, 0].long().clamp_(max=packed.out_features - 1), highest, lse


@cache
def _kernel(int8: bool) -> Kernel:
    return build("likeliest", lambda e: _Likeliest(e, int8=int8).emit())


class _Likeliest(Product):
    """A product with logits as its residual, of which each panel leaves the highest, its place, and the sum of exponentials below it.

    Arguments: those of the product, then three [S, P].
    """

    def __init__(self, e: Emitter, *, int8: bool) -> None:
        super().__init__(e, "", has_bias=False, has_residual=True, int8=int8)
        self.highs, self.exponentials, self.places = e.pointer(13), e.pointer(14), e.pointer(15)

    def write(self, row: ir.Value, column: ir.Value, first: ir.Value, second: ir.Value) -> None:
        e = self.e
        at = e.add(e.mul(row, self.panels), e.div(column, self.width))
        highest = e.reduce_max(e.maximum(first, second))
        level = e.splat(highest)
        total = e.b.fadd(*(e.exp(e.b.fsub(part, level)) for part in (first, second)))
        nowhere = e.splat_i32(e.const((1 << 31) - 1))
        numbers = [e.lane_numbers(e.add(column, half * lanes())) for half in (0, 1)]
        found = [e.b.select(e.b.fcmp_ordered("==", part, level), at, nowhere) for part, at in zip((first, second), numbers, strict=True)]
        place = e.reduce_least_i32(e.b.select(e.b.icmp_signed("<", *found), *found))
        e.store(highest, self.highs, at)
        e.store(e.reduce_add(total), self.exponentials, at)
        e.b.store(e.b.trunc(place, I32), e.at(self.places, at, I32), align=4)
