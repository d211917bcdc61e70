"""Which fixed shape a step runs in, and how it is padded to it: numpy over sequences, no tensor.

A captured graph has one shape. Steps are therefore padded to the next *tier* of (tokens, sequence slots): never of tokens alone, for a
verification step of 8 sequences with 7 drafts and a decoding step of 64 sequences have the same tokens and nothing else in common.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.runner import PackedStep

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tier:
    """A step of exactly `tokens` rows and `sequences` slots, and one slot more, which owns the padding rows."""

    tokens: int
    sequences: int


class Tiers:
    """Token tiers are 2^n and 3 * 2^n, so at most a third of a step is padding; sequence tiers are powers of two."""

    def __init__(self, max_tokens: int, max_sequences: int) -> None:
        self.tokens = sorted(
            {size for n in range(max_tokens.bit_length()) for size in (1 << n, 3 << n) if size <= max_tokens} | {max_tokens}
        )
        self.sequences = sorted({min(1 << n, max_sequences) for n in range(max_sequences.bit_length() + 1)})

    def of(self, tokens: int, sequences: int) -> Tier | None:
        """The smallest tier that holds the step; None where it is larger than any, and runs as it is."""
        if tokens > self.tokens[-1] or sequences > self.sequences[-1]:
            return None
        return Tier(self.tokens[bisect_left(self.tokens, tokens)], self.sequences[bisect_left(self.sequences, sequences)])

    def spare(self, tokens: int, sequences: int) -> int:
        """Rows that the step's tier has beyond its own: they are computed in any case, so useful tokens in them cost nothing."""
        tier = self.of(tokens, sequences)
        return 0 if tier is None else tier.tokens - tokens


def fill(chosen: Ints, drafted: Ints, spare: int) -> Ints:
    """int64 [S]: `chosen` drafts of each request, and up to `spare` more of those that were drafted, shortest first.

    Looks at counts alone, never at what was drafted, so the choice stays exact for random drafts.
    """
    filled = chosen.copy()
    room = int(np.minimum(spare, (drafted - chosen).sum()))
    while room > 0:
        open_ = np.flatnonzero(filled < drafted)
        shortest = open_[filled[open_] == filled[open_].min()][:room]
        filled[shortest] += 1
        room -= len(shortest)
    return filled


def pad(step: PackedStep, tier: Tier, rows: int, width: int) -> PackedStep:
    """The step in the shape of its tier: `tier.tokens` tokens, `tier.sequences + 1` sequences, `rows` logit rows, tables of `width`.

    Slots without a sequence have no rows. Padding tokens belong to the last sequence, at positions from 0 on in block 0, which no
    request ever holds: every row of the step is some sequence's row, so nothing reads what was never written.
    """
    count, pads = step.num_tokens, tier.tokens - step.num_tokens
    size = len(step.kv_lengths)
    kv_lengths = np.zeros(tier.sequences + 1, np.int32)
    kv_lengths[:size], kv_lengths[-1] = step.kv_lengths, pads
    query_start = np.full(tier.sequences + 2, count, np.int32)
    query_start[: size + 1], query_start[-1] = step.query_start, tier.tokens
    tables = np.zeros((tier.sequences + 1, width), np.int32)
    tables[:size, : step.tables.shape[1]] = step.tables
    return PackedStep(
        token_ids=_grown(step.token_ids, tier.tokens),
        positions=np.concatenate((step.positions, np.arange(pads))),
        slots=np.concatenate((step.slots, np.zeros(pads, np.int64))),
        tables=tables,
        query_start=query_start,
        kv_lengths=kv_lengths,
        logit_rows=_grown(step.logit_rows, rows),
        row_starts=step.row_starts,
        row_counts=step.row_counts,
        shared_prefix_blocks=0,
        sources=np.concatenate((np.full(count, -1, np.int64) if step.sources is None else step.sources, np.full(pads, -1, np.int64))),
    )


def _grown(values: Ints, size: int) -> Ints:
    grown = np.zeros(size, np.int64)
    grown[: len(values)] = values
    return grown
