"""What attention has to do in a step, worked out once for all layers: jobs of rows that read the same stretch of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.reference.shared_prefixes import find_segments

CHUNK = 128
"""Keys whose scores a tile holds at a time; also the grain at which shared prefixes are read once."""
KEYS = 16
"""Keys of one step of the inner loop. Blocks of the cache hold a multiple of it."""
RESUME, FINISH = 1, 2
"""A job goes on from what an earlier wave left; a job divides by the sum of weights instead of leaving its state."""

_LINES = 24
MOST_LINES = 64
MOST_HEAD_DIM = 256
_ALL = 1 << 40

_Ints = NDArray[np.int64]


def lines_at_once(group: int) -> int:
    """Lines (rows times query heads of a key head) of a job: its state is to stay in the first-level cache."""
    return max(_LINES // group, 1) * group


@dataclass(frozen=True, slots=True)
class NativePlan:
    """What all layers of a step share.

    slots: int64 [T], where each row's key and value go. tables: int32 [S, W]. rows: int32, packed rows, of which jobs name stretches.
    visible_from, visible_to: int64 [T], the positions a row sees. waves: int64 [jobs, 6] each, to be run one after the other; a job is
    (first of `rows`, number of rows, row of `tables`, first chunk, last chunk, flags). state: float32 [T * heads * 2], what waves hand
    on. work: pairs of rows and positions they see.
    """

    slots: torch.Tensor
    tables: NDArray[np.int32]
    rows: NDArray[np.int32]
    visible_from: _Ints
    visible_to: _Ints
    waves: tuple[_Ints, ...]
    state: torch.Tensor
    work: int


def plan_attention(
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    kv_lengths: torch.Tensor,
    slots: torch.Tensor,
    *,
    cache: torch.Tensor,
    num_heads: int,
    window: int | None = None,
) -> NativePlan:
    """See `kernels.reference.attention_plan.plan_attention`."""
    _, kv_heads, block_size, _ = cache.shape
    tables = block_tables.numpy()
    bounds, lengths = query_start.numpy().astype(np.int64), kv_lengths.numpy().astype(np.int64)
    counts = np.diff(bounds)
    starts = lengths - counts
    positions = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], counts)
    visible_from = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    rows_at_once = lines_at_once(num_heads // kv_heads) // (num_heads // kv_heads)
    rows = [np.arange(bounds[-1])]
    waves: list[list[_Ints]] = []
    covered = np.zeros(len(tables), np.int64)
    if window is None and len(tables) > 1:
        # Equal blocks mean equal prefixes, so a chunk is told by its last block.
        chunks = tables[:, CHUNK // block_size - 1 :: CHUNK // block_size]
        segments, covered = find_segments(chunks, starts // CHUNK, counts, CHUNK)
        next_wave = np.zeros(len(tables), np.int64)
        for segment in sorted(segments, key=lambda segment: segment.first):
            wave = int(next_wave[segment.members].max())
            next_wave[segment.members] = wave + 1
            members = np.concatenate([np.arange(bounds[s], bounds[s + 1]) for s in segment.members])
            first = sum(map(len, rows))
            rows.append(members)
            flags = RESUME if segment.first else 0
            jobs = _strips(np.array([first]), np.array([len(members)]), rows_at_once)
            waves += [[] for _ in range(wave + 1 - len(waves))]
            waves[wave].append(_jobs(jobs, segment.members[0], segment.first, segment.end, flags))
    own = _strips(bounds[:-1], counts, rows_at_once)
    owner = np.repeat(np.arange(len(tables)), -(-counts // rows_at_once))
    first_chunk = np.maximum(covered[owner], visible_from[own[:, 0]] // CHUNK)
    final = _jobs(own, owner, first_chunk, _ALL, np.where(covered[owner] > 0, RESUME, 0) | FINISH)
    work = own[:, 1] * (lengths[owner] - first_chunk * CHUNK)
    state = torch.empty(len(positions) * num_heads * 2 if waves else 0)
    return NativePlan(
        slots,
        np.ascontiguousarray(tables),
        np.concatenate(rows).astype(np.int32),
        visible_from,
        positions + 1,
        (*(np.concatenate(jobs) for jobs in waves), final[np.argsort(-work, kind="stable")]),  # the longest first: threads end together
        state,
        int((positions + 1).sum()),
    )


def _strips(first: _Ints, counts: _Ints, at_once: int) -> _Ints:
    """int64 [N, 2] (first, count): each run of `counts[i]` rows cut into as few pieces of at most `at_once` as can be, all about equal."""
    pieces = -(-counts // at_once)
    owner = np.repeat(np.arange(len(counts)), pieces)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    size, longer = np.divmod(counts, np.maximum(pieces, 1))
    return np.stack((first[owner] + index * size[owner] + np.minimum(index, longer[owner]), size[owner] + (index < longer[owner])), axis=1)


def _jobs(strips: _Ints, table: _Ints | int, first: _Ints | int, last: _Ints | int, flags: _Ints | int) -> _Ints:
    jobs = np.empty((len(strips), 6), np.int64)
    jobs[:, :2] = strips
    for column, values in enumerate((table, first, last, flags), start=2):
        jobs[:, column] = values
    return jobs
