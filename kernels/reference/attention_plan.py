"""Everything about a step's attention that does not depend on the layer, worked out once and reused by all layers.

Sequences are split by how many query rows they bring:

- few rows (decoding, short drafts): *ragged*. Every (row, head) reads exactly its own keys where they lie in the paged cache: scores by
  a sampled product (`torch.sparse.sampled_addmm`), values by `embedding_bag`. Nothing is gathered, nothing is padded.
- many rows (prefill, long drafts): *dense*. Keys and values are gathered into one padded batch per bucket of like-sized sequences
  and go through flash attention with a mask; the gather is paid once for all rows.

What several sequences have in common is taken out of both and read once, see `kernels.reference.shared_prefixes`.

Figures (2 cores, float32, 9 heads over 3, 64 sequences of 100-300 tokens, per layer): ragged 1.9 ms a query row, dense 6 ms for
1 to 5 rows; hence `MAX_RAGGED_ROWS`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.reference.shared_prefixes import Segment, find_segments

MAX_RAGGED_ROWS = 3

_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RaggedGroup:
    """R query rows over N = heads * (total visible tokens) score entries, ordered by (row, head, position).

    rows: int64 [R] in the packed step. pattern: sparse CSR [R * heads, cache rows]; its values are scratch for the scores.
    columns: int64 [N] cache rows; offsets: int64 [R * heads], where each (row, head) begins. cells: int64 [N], the place of
    each entry in a [R * heads, width] matrix.
    """

    rows: torch.Tensor
    pattern: torch.Tensor
    columns: torch.Tensor
    offsets: torch.Tensor
    cells: torch.Tensor
    width: int


@dataclass(frozen=True, slots=True)
class DenseGroup:
    """S sequences padded to Q query rows and W cache blocks.

    rows: int64 [S * Q] packed rows, padding repeats a sequence's last row. blocks: int64 [S * kv_heads * W], row numbers
    of the cache seen as [num_blocks * kv_heads, block_size * head_dim]. mask: [S, 1, heads_per_kv * Q, W * block_size], 0 or -inf.
    real: int64 [rows that are no padding], indices into the S * Q rows; targets: int64, the packed rows they belong to.
    """

    rows: torch.Tensor
    blocks: torch.Tensor
    mask: torch.Tensor
    real: torch.Tensor
    targets: torch.Tensor
    num_sequences: int
    num_queries: int


@dataclass(frozen=True, slots=True)
class SharedGroup:
    """R query rows that all see the same W blocks in full. rows: int64 [R]. blocks: int64 [kv_heads * W], as in `DenseGroup`."""

    rows: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """slots: int64 [T], where each row's key and value go (block * block_size + offset).

    Every row is in exactly one ragged or dense group, which holds what it sees beyond its shared groups (none, one or several).
    """

    slots: torch.Tensor
    ragged: tuple[RaggedGroup, ...]
    dense: tuple[DenseGroup, ...]
    shared: tuple[SharedGroup, ...]


@dataclass(frozen=True, slots=True)
class DefinedPlan:
    """A step as `kernels.reference.paged_attention` takes it: for fp8 caches, which torch's own products on a CPU do not read, for draft
    blocks that see all of their own rows, and for caches that lie in memory in another order.
    """

    slots: torch.Tensor
    tables: torch.Tensor
    query_start: torch.Tensor
    kv_lengths: torch.Tensor
    window: int | None
    causal: bool = True


@dataclass(frozen=True, slots=True)
class _Step:
    """The step on the host. window: 0 for none. covered: leading blocks of each sequence that shared groups take care of."""

    tables: _Ints
    query_start: _Ints
    kv_lengths: _Ints
    num_blocks: int
    kv_heads: int
    block_size: int
    heads_per_kv: int
    window: int
    covered: _Ints
    dtype: torch.dtype
    device: torch.device

    @property
    def query_lengths(self) -> _Ints:
        return np.diff(self.query_start)

    @property
    def starts(self) -> _Ints:
        """Position of each sequence's first query."""
        return self.kv_lengths - self.query_lengths

    def first_visible(self, positions: _Ints) -> _Ints:
        """The first key position that a query at each position sees."""
        return np.maximum(positions - self.window + 1, 0) if self.window else np.zeros_like(positions)

    def tensor(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def plan_attention(
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    kv_lengths: torch.Tensor,
    slots: torch.Tensor,
    *,
    cache: torch.Tensor,
    num_heads: int,
    window: int | None = None,
    causal: bool = True,
) -> AttentionPlan | DefinedPlan:
    """Plans one step; arguments as in `engine.batch.ForwardBatch`.

    cache: any layer's keys [num_blocks, kv_heads, block_size, head_dim]; only shape, dtype and device are read. window: a
    query sees itself and `window - 1` tokens before it; None for all. causal: False for draft blocks, whose rows also see each other (and
    with a window what comes after them). Raises ValueError where num_heads is not a multiple of kv_heads.
    """
    num_blocks, kv_heads, block_size, _ = cache.shape
    if num_heads % kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {kv_heads} key heads evenly")
    if cache.dtype == torch.float8_e4m3fn or not causal or not cache.is_contiguous():
        return DefinedPlan(slots, block_tables, query_start, kv_lengths, window, causal)
    tables, bounds, lengths = (array.cpu().numpy().astype(np.int64) for array in (block_tables, query_start, kv_lengths))
    segments, covered = _segments(tables, bounds, lengths, block_size, windowed=window is not None)
    step = _Step(
        tables=tables,
        query_start=bounds,
        kv_lengths=lengths,
        num_blocks=num_blocks,
        kv_heads=kv_heads,
        block_size=block_size,
        heads_per_kv=num_heads // kv_heads,
        window=window or 0,
        covered=covered,
        dtype=cache.dtype,
        device=cache.device,
    )
    # sampled_addmm and embedding_bag with weights exist for float32 on the CPU; anything else is dense.
    exact = cache.dtype == torch.float32 and cache.device.type == "cpu"
    few = step.query_lengths <= (MAX_RAGGED_ROWS if exact else 0)
    return AttentionPlan(
        slots=slots,
        ragged=tuple(_ragged_groups(step, np.flatnonzero(few))),
        dense=tuple(_dense_groups(step, np.flatnonzero(~few))),
        shared=tuple(_shared_group(step, segment) for segment in segments),
    )


def _segments(tables: _Ints, bounds: _Ints, lengths: _Ints, block_size: int, *, windowed: bool) -> tuple[list[Segment], _Ints]:
    """Shared segments; none with a window, whose rows each see another stretch."""
    if windowed or len(tables) < 2:
        return [], np.zeros(len(tables), np.int64)
    query_lengths = np.diff(bounds)
    return find_segments(tables, (lengths - query_lengths) // block_size, query_lengths, block_size)


def _shared_group(step: _Step, segment: Segment) -> SharedGroup:
    members = segment.members
    member, index = _runs(step.query_lengths[members])
    blocks = step.tables[members[0], segment.first : segment.end] * step.kv_heads + np.arange(step.kv_heads)[:, None]
    return SharedGroup(step.tensor(step.query_start[members][member] + index), step.tensor(blocks.reshape(-1)))


def _runs(lengths: _Ints) -> tuple[_Ints, _Ints]:
    """For runs of the given lengths laid end to end: the run of each element, and its index inside that run."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)
    return owner, np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _ragged_groups(step: _Step, sequences: _Ints) -> list[RaggedGroup]:
    """One group for each power of four in visible tokens: the padded softmax then wastes little, and groups stay few."""
    if len(sequences) == 0:
        return []
    member, index = _runs(step.query_lengths[sequences])
    owners = sequences[member]
    rows = step.query_start[owners] + index
    positions = step.starts[owners] + index
    first = np.maximum(step.first_visible(positions), step.covered[owners] * step.block_size)
    lengths = positions - first + 1
    size_class = np.ceil(np.log2(np.maximum(lengths, 64)) / 2).astype(np.int64)
    groups = []
    for size in np.unique(size_class):
        chosen = size_class == size
        groups.append(_ragged_group(step, owners[chosen], rows[chosen], first[chosen], lengths[chosen]))
    return groups


def _ragged_group(step: _Step, owners: _Ints, rows: _Ints, first: _Ints, lengths: _Ints) -> RaggedGroup:
    heads = step.kv_heads * step.heads_per_kv
    line_lengths = np.repeat(lengths, heads)
    line, index = _runs(line_lengths)
    row, head = line // heads, line % heads // step.heads_per_kv
    position = first[row] + index
    block = step.tables[owners[row], position // step.block_size]
    columns = step.tensor((block * step.kv_heads + head) * step.block_size + position % step.block_size)
    bounds = np.zeros(len(line_lengths) + 1, np.int64)
    np.cumsum(line_lengths, out=bounds[1:])
    crow = step.tensor(bounds)
    width = int(lengths.max())
    cache_rows = step.num_blocks * step.kv_heads * step.block_size
    _silence_beta_warning()
    pattern = torch.sparse_csr_tensor(
        crow, columns, torch.zeros(len(columns), dtype=step.dtype), size=(len(line_lengths), cache_rows), check_invariants=False
    )
    return RaggedGroup(step.tensor(rows), pattern, columns, crow[:-1], step.tensor(line * width + index), width)


@cache
def _silence_beta_warning() -> None:
    """torch announces once per process that sparse CSR is in beta; the two operations used here are covered by our tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1))


def _dense_groups(step: _Step, sequences: _Ints) -> list[DenseGroup]:
    """Buckets by query rows (powers of two) and by visible blocks (half powers of two)."""
    if len(sequences) == 0:
        return []
    first_block = np.maximum(step.first_visible(step.starts[sequences]) // step.block_size, step.covered[sequences])
    widths = -(-step.kv_lengths[sequences] // step.block_size) - first_block
    by_rows = np.ceil(np.log2(step.query_lengths[sequences])).astype(np.int64)
    by_width = np.ceil(2 * np.log2(widths)).astype(np.int64)
    bucket = by_rows * 1000 + by_width
    groups = []
    for key in np.unique(bucket):
        chosen = bucket == key
        groups.append(_dense_group(step, sequences[chosen], first_block[chosen], widths[chosen]))
    return groups


def _dense_group(step: _Step, sequences: _Ints, first_block: _Ints, widths: _Ints) -> DenseGroup:
    lengths = step.query_lengths[sequences]
    num_sequences, num_queries, width = len(sequences), int(lengths.max()), int(widths.max())
    index = np.arange(num_queries)
    real = index < lengths[:, None]
    rows = step.query_start[sequences][:, None] + np.minimum(index, lengths[:, None] - 1)
    column = first_block[:, None] + np.arange(width)
    table = step.tables[sequences[:, None], np.minimum(column, step.tables.shape[1] - 1)]
    blocks = table[:, None, :] * step.kv_heads + np.arange(step.kv_heads)[None, :, None]
    query_position = (step.starts[sequences][:, None] + np.minimum(index, lengths[:, None] - 1))[:, :, None]
    key_position = (first_block[:, None] * step.block_size + np.arange(width * step.block_size))[:, None, :]
    visible = (key_position <= query_position) & (key_position >= step.first_visible(query_position))
    mask = torch.zeros(visible.shape, dtype=step.dtype).masked_fill_(torch.from_numpy(~visible), float("-inf"))
    mask = mask.unsqueeze(1).repeat(1, 1, step.heads_per_kv, 1)
    return DenseGroup(
        rows=step.tensor(rows.reshape(-1)),
        blocks=step.tensor(blocks.reshape(-1)),
        mask=mask.to(step.device),
        real=step.tensor(np.flatnonzero(real)),
        targets=step.tensor(rows[real]),
        num_sequences=num_sequences,
        num_queries=num_queries,
    )
