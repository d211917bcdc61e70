"""Which stretches of the cache several sequences read in common, so that a step reads each of them once.

Sequences that share a prompt prefix have equal leading entries in their block tables. The tables of a step form a tree; every
branch that is long enough for enough rows becomes one segment, attended by all its rows in one product ("cascade" attention,
as in FlashInfer, arXiv 2501.01005, section 3.1.2), and the partial results are merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_ROWS_TIMES_TOKENS = 2048
"""Below this a segment costs more in its own operations (some 0.15 ms a layer) than the reads it saves (0.3 us a row and token)."""

_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks `first` to `end` of the tables of `members`, in full view of every query row of theirs."""

    members: _Ints
    first: int
    end: int


def find_segments(tables: _Ints, visible_blocks: _Ints, query_lengths: _Ints, block_size: int) -> tuple[list[Segment], _Ints]:
    """The segments, and how many leading blocks of each sequence they cover (without gaps).

    tables: [S, width]. visible_blocks: [S], leading blocks that lie wholly before the sequence's first query row.
    """
    covered = np.zeros(len(tables), np.int64)
    segments: list[Segment] = []
    pending = [(np.arange(len(tables)), 0, 0)]
    while pending:
        members, start, depth = pending.pop()
        members = members[visible_blocks[members] > depth]
        if len(members) < 2:
            continue
        for block in np.unique(tables[members, depth]):
            branch = members[tables[members, depth] == block]
            if len(branch) < 2:
                continue
            end = _common_end(tables[branch], depth, int(visible_blocks[branch].min()))
            if query_lengths[branch].sum() * (end - start) * block_size >= MIN_ROWS_TIMES_TOKENS:
                segments.append(Segment(branch, start, end))
                covered[branch] = end
                pending.append((branch, end, end))
            else:
                pending.append((branch, start, end))  # too short by itself: a longer branch below may still take it along
    return segments, covered


def _common_end(tables: _Ints, depth: int, limit: int) -> int:
    """The first column at or after `depth` where the rows differ, at most `limit`."""
    same = (tables[:, depth:limit] == tables[0, depth:limit]).all(axis=0)
    return limit if same.all() else depth + int(same.argmin())
