"""The cut of top-k and top-p in a row of logits: a threshold on the logit, found without sorting.

Two walks that count (top-k) or weigh (top-p) what lies above 4 pivots narrow it down to a stretch that holds few numbers; a third copies
these out, and the rest of the search goes over them alone. Walks read from the L2 cache: a row of 152k float32 logits is 0.6 MB. They are
bound by latency, so a step of one is as wide as registers allow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.vocabulary import INFINITE_KEY, LEAST_KEY, of_key, processed, sort_key

_PIVOTS: tl.constexpr = tl.constexpr(4)
_REACH: tl.constexpr = tl.constexpr(40.0)
"""How far below the peak the first pivots reach, in temperatures: what lies deeper weighs less than 1e-17 of it."""


@triton.jit
def cut(
    row_at, vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts, stride_biases, stride_counts,
    stride_bits, presence, frequency, repetition, scratch, peak, inverse, limit, under, high,
    BY_MASS: tl.constexpr, BIASES: tl.constexpr, PENALTIES: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """int64: the smallest key in (under, high] such that numbers above it count (or weigh) less than `limit`. That is so at `high`.

    scratch: int32 [ROOM + 1], the program's own.
    """
    lane = tl.arange(0, _PIVOTS)
    turn = 0
    while high - under > 1:
        # Spaced evenly by value at first, as logits are; by bit pattern where that did not help, which always ends.
        known = under > INFINITE_KEY
        lowest = tl.where(known, of_key(tl.where(known, under, 0)), float("-inf"))
        if turn == 0:
            lowest = tl.maximum(lowest, peak - _REACH / inverse)
        top = of_key(high)
        spaced = lowest + (top - lowest) * (lane.to(tl.float32) / _PIVOTS)
        pivots = under + (lane + 1) * tl.maximum((high - under) // (_PIVOTS + 1), 1)
        if (turn < 3) & (lowest > float("-inf")):
            pivots = sort_key(spaced).to(tl.int64)
        pivots = tl.minimum(tl.maximum(pivots, under), high)
        held = tl.zeros([BLOCK, _PIVOTS], tl.float32 if BY_MASS else tl.int32)
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = processed(
                row_at, ids, ids < vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts,
                stride_biases, stride_counts, stride_bits, presence, frequency, repetition, BIASES, PENALTIES, MASK,
            )  # fmt: skip
            over = (sort_key(x)[:, None] > pivots.to(tl.int32)[None, :]) & (ids < vocab)[:, None]
            if BY_MASS:
                held += tl.where(over, tl.exp((x - peak) * inverse)[:, None], 0.0)
            else:
                held += over.to(tl.int32)
        weighs = tl.sum(held, axis=0)
        holds = ((weighs < limit) & (pivots > under)) | (pivots >= high)
        lower = tl.max(tl.where(holds, under, pivots), axis=0)
        high = tl.min(tl.where(holds, pivots, high), axis=0)
        under = lower
        turn += 1
        if (turn >= 2) & (high - under > 1):
            counter = scratch + ROOM
            tl.store(counter, 0)
            tl.debug_barrier()
            above = tl.zeros([BLOCK], tl.float32 if BY_MASS else tl.int32)
            for start in range(0, vocab, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                x = processed(
                    row_at, ids, ids < vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts,
                    stride_biases, stride_counts, stride_bits, presence, frequency, repetition, BIASES, PENALTIES, MASK,
                )  # fmt: skip
                key = sort_key(x)
                within = (key > under) & (key <= high) & (ids < vocab)
                place = tl.atomic_add(counter + tl.zeros([BLOCK], tl.int32), 1, mask=within)
                tl.store(scratch + place, key, mask=within & (place < ROOM))
                past = (key > high) & (ids < vocab)
                if BY_MASS:
                    above += tl.where(past, tl.exp((x - peak) * inverse), 0.0)
                else:
                    above += past.to(tl.int32)
            tl.debug_barrier()
            found = tl.atomic_add(counter, 0)
            if found <= ROOM:
                index = tl.arange(0, ROOM)
                key = tl.load(scratch + index, mask=index < found, other=LEAST_KEY, cache_modifier=".cg").to(tl.int64)
                weight = (index < found).to(tl.float32)
                if BY_MASS:
                    weight = tl.where(index < found, tl.exp((of_key(tl.where(index < found, key, 0)) - peak) * inverse), 0.0)
                beyond = tl.sum(above, axis=0).to(tl.float32)
                while high - under > 1:
                    middle = under + (high - under) // 2
                    if beyond + tl.sum(tl.where(key > middle, weight, 0.0), axis=0) < limit:
                        high = middle
                    else:
                        under = middle
            # Nobody may overwrite what others still read.
            tl.debug_barrier()
    return high


@triton.jit
def mass_from(
    row_at, vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts, stride_biases, stride_counts,
    stride_bits, presence, frequency, repetition, peak, inverse, low,
    BIASES: tl.constexpr, PENALTIES: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """float32: what the numbers whose key is not below `low` weigh, relative to the peak."""
    held = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = processed(
            row_at, ids, ids < vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts,
            stride_biases, stride_counts, stride_bits, presence, frequency, repetition, BIASES, PENALTIES, MASK,
        )  # fmt: skip
        held += tl.where(sort_key(x) >= low, tl.exp((x - peak) * inverse), 0.0)
    return tl.sum(held, axis=0)
