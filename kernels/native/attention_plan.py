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

_LINES, _FEWER_LINES = 48, 24
"""Of a job at most (rows times query heads of a key head), and where that makes too few jobs for the threads to end together. Every job
reads its keys and values from the second-level cache or from memory, so more lines read less; 48, with their sums, leave room in the
first-level cache.
"""
_ITEMS = 3
"""Jobs times key heads that each thread is to have."""
MOST_LINES = 64
MOST_HEAD_DIM = 256
_ALL = 1 << 40

_Ints = NDArray[np.int64]


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
    group = num_heads // kv_heads
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
            resumes = RESUME if segment.first else 0
            waves += [[] for _ in range(wave + 1 - len(waves))]
            waves[wave].append(np.array([first, len(members), segment.members[0], segment.first, segment.end, resumes]))
    flags = np.where(covered > 0, RESUME, 0) | FINISH
    own = _cut(np.stack((bounds[:-1], counts, np.arange(len(tables)), covered, np.full_like(counts, _ALL), flags), axis=1), group, kv_heads)
    own[:, 3] = np.maximum(own[:, 3], visible_from[own[:, 0]] // CHUNK)
    work = own[:, 1] * (lengths[own[:, 2]] - own[:, 3] * CHUNK)
    state = torch.empty(len(positions) * num_heads * 2 if waves else 0)
    final = own[np.argsort(-work, kind="stable")]  # the longest first: threads end together
    return NativePlan(
        slots,
        np.ascontiguousarray(tables),
        np.concatenate(rows).astype(np.int32),
        visible_from,
        positions + 1,
        (*(_cut(np.stack(runs), group, kv_heads) for runs in waves), final),
        state,
        int((positions + 1).sum()),
    )


def _cut(runs: _Ints, group: int, kv_heads: int) -> _Ints:
    """Jobs of runs of rows: [N, 6] both, as in `NativePlan`; each run in as few jobs as can be, all about equal."""
    for lines in (_LINES, _FEWER_LINES):
        pieces = -(-runs[:, 1] // max(lines // group, 1))
        if pieces.sum() * kv_heads >= _ITEMS * torch.get_num_threads():
            break
    jobs = np.repeat(runs, pieces, axis=0)
    index = np.arange(len(jobs)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    size, longer = (np.repeat(part, pieces) for part in np.divmod(runs[:, 1], np.maximum(pieces, 1)))
    jobs[:, 0] += index * size + np.minimum(index, longer)
    jobs[:, 1] = size + (index < longer)
    return jobs
