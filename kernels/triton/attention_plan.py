"""What attention on the device needs to know of a step, worked out once for all layers, on the device and without asking it anything.

Work is cut into tiles of `block_q` query rows of one *unit*: a sequence with the keys of its own, or a run of neighbouring sequences
with the prefix that all of them share (cascade attention, arXiv 2501.01005, section 3.1.2), read once for all their rows. How many
tiles there are depends on the data; how many are launched only on shapes, so a captured graph stays right for every step of its tier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SMALL_TILE = 16
_LARGE_TILE = 128
_PREFILL_ROWS = 32
"""Rows a sequence from which large tiles pay: they read keys once for more rows, and waste more where rows are few."""
_MAX_SPLITS = 64
_KEYS_A_SPLIT = 256
_PROGRAMS_A_PROCESSOR = 2
MIN_SHARED_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """tables: int32 [S, widest]; slots: int64 [T], where each row's key and value go (negative: nowhere).

    tile_unit, tile_row: int32 [tiles], the unit (-1: none) and first query row of each tile. Units: int32 [S], or [2 S] with shared
    prefixes (the second half): `row_end`, `key_begin`, `key_end`, `table_row`, and `offset` from row number to position.
    """

    tables: torch.Tensor
    slots: torch.Tensor
    tile_unit: torch.Tensor
    tile_row: torch.Tensor
    row_end: torch.Tensor
    key_begin: torch.Tensor
    key_end: torch.Tensor
    table_row: torch.Tensor
    offset: torch.Tensor
    num_sequences: int
    block_m: int
    block_q: int
    splits: int
    shared: bool
    window: int | None
    causal: bool


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
    shared: bool = True,
    max_query: int | None = None,
    max_kv: int | None = None,
    processors: int | None = None,
) -> DevicePlan:
    """Arguments as in `kernels.reference.paged_attention`, and `slots` int64 [T].

    shared: look for prefixes that neighbours have in common (never with a window, whose rows each see another stretch). max_query,
    max_kv: upper bounds where the caller has them. processors: of the device, to choose how far keys are split; None asks for it.
    Raises ValueError where num_heads is not a multiple of kv_heads, or where shapes do not fit.
    """
    _, kv_heads, block_size, _ = cache.shape
    num_sequences, num_rows = len(kv_lengths), len(slots)
    if num_heads % kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {kv_heads} key heads evenly")
    if block_tables.shape[0] != num_sequences or len(query_start) != num_sequences + 1:
        raise ValueError(
            f"{num_sequences} kv_lengths need as many block tables and one more query_start, "
            f"got {block_tables.shape[0]} and {len(query_start)}"
        )
    group = num_heads // kv_heads
    block_m = _tile(num_rows, num_sequences, group, max_query)
    # Large tiles read keys once for many rows as it is; there the merge would cost more than it saves.
    shared = shared and window is None and num_sequences > 1 and block_m < _LARGE_TILE
    block_q = block_m // group
    units = _units(block_tables, query_start, kv_lengths, block_size, shared=shared)
    counts = (units.row_end - units.row_begin + block_q - 1) // block_q
    ends = torch.cumsum(counts, 0)
    num_tiles = num_rows // block_q + num_sequences
    if shared:
        num_tiles += num_rows // block_q + num_sequences // 2
    tiles = torch.arange(num_tiles, device=ends.device)
    unit = torch.searchsorted(ends, tiles, right=True)
    known = unit.clamp(max=len(ends) - 1)
    first = units.row_begin[known] + (tiles - (ends - counts)[known]) * block_q
    return DevicePlan(
        tables=block_tables,
        slots=slots,
        tile_unit=torch.where(unit < len(ends), unit, -1).to(torch.int32),
        tile_row=first.to(torch.int32),
        row_end=units.row_end.to(torch.int32),
        key_begin=units.key_begin.to(torch.int32),
        key_end=units.key_end.to(torch.int32),
        table_row=units.table_row.to(torch.int32),
        offset=(units.position - units.row_begin).to(torch.int32),
        num_sequences=num_sequences,
        block_m=block_m,
        block_q=block_q,
        splits=_splits(
            num_sequences * -(-num_rows // max(num_sequences * block_q, 1)) * kv_heads,
            max_kv or block_tables.shape[1] * block_size,
            processors or _processors(cache.device),
        ),
        shared=shared,
        window=window,
        causal=causal,
    )


@dataclass(frozen=True, slots=True)
class _Units:
    """int64 [U] each; see `DevicePlan`. position: of the unit's first row."""

    row_begin: torch.Tensor
    row_end: torch.Tensor
    key_begin: torch.Tensor
    key_end: torch.Tensor
    table_row: torch.Tensor
    position: torch.Tensor


def _units(tables: torch.Tensor, query_start: torch.Tensor, kv_lengths: torch.Tensor, block_size: int, *, shared: bool) -> _Units:
    begin, end = query_start[:-1].long(), query_start[1:].long()
    lengths = kv_lengths.long()
    position = lengths - (end - begin)
    index = torch.arange(len(lengths), device=lengths.device)
    if not shared:
        return _Units(begin, end, torch.zeros_like(lengths), lengths, index, position)
    groups = shared_groups(tables, query_start, kv_lengths, block_size)
    covered = groups.blocks[groups.member] * block_size
    return _Units(
        torch.cat((begin, groups.row_begin)),
        torch.cat((end, groups.row_end)),
        torch.cat((covered, torch.zeros_like(lengths))),
        torch.cat((lengths, groups.blocks * block_size)),
        torch.cat((index, groups.first)),
        torch.cat((position, torch.zeros_like(lengths))),
    )


@dataclass(frozen=True, slots=True)
class SharedGroups:
    """Runs of neighbouring sequences by group number, int64 [S] each; groups that share nothing have no rows and no blocks.

    member: the group of each sequence. blocks: leading blocks that all members have in common, wholly before their first query.
    row_begin, row_end: the group's query rows. first: its first sequence.
    """

    member: torch.Tensor
    blocks: torch.Tensor
    row_begin: torch.Tensor
    row_end: torch.Tensor
    first: torch.Tensor


def shared_groups(
    tables: torch.Tensor, query_start: torch.Tensor, kv_lengths: torch.Tensor, block_size: int, min_blocks: int = MIN_SHARED_BLOCKS
) -> SharedGroups:
    """Links sequences whose tables begin with the same `min_blocks` blocks or more as their neighbour's."""
    begin, end = query_start[:-1].long(), query_start[1:].long()
    size = len(kv_lengths)
    complete = torch.where(end > begin, (kv_lengths.long() - (end - begin)) // block_size, 0)
    same = (tables[1:] == tables[:-1]).to(torch.int32).cumprod(1).sum(1)
    common = torch.minimum(same, torch.minimum(complete[1:], complete[:-1]))
    linked = torch.cat((common.new_zeros(1, dtype=torch.bool), common >= min_blocks))
    member = torch.cumsum((~linked).long(), 0) - 1
    index = torch.arange(size, device=tables.device)
    first = torch.full_like(index, size - 1).scatter_reduce(0, member, index, "amin")
    limit = torch.where(linked, torch.cat((common[:1], common)), torch.iinfo(torch.int64).max)
    blocks = torch.full_like(index, torch.iinfo(torch.int64).max).scatter_reduce(0, member, limit, "amin")
    several = blocks < torch.iinfo(torch.int64).max
    row_begin = begin[first]
    row_end = torch.zeros_like(index).scatter_reduce(0, member, end, "amax")
    return SharedGroups(member, torch.where(several, blocks, 0), row_begin, torch.where(several, row_end, row_begin), first)


def _tile(num_rows: int, num_sequences: int, group: int, max_query: int | None) -> int:
    """Query lines of a tile (rows x heads of one key head): a power of two that holds at least one row."""
    rows = max_query if max_query is not None else -(-num_rows // max(num_sequences, 1))
    wanted = _LARGE_TILE if rows >= _PREFILL_ROWS else min(max(rows * group, _SMALL_TILE), 64)
    return 1 << (max(wanted, group) - 1).bit_length()


def _splits(programs: int, keys: int, processors: int) -> int:
    """Stretches that each unit's keys are cut into, so that the device is full when sequences are few: the fewest with which the last wave
    of programs leaves hardly more idle than it has to (as FlashAttention chooses them for decoding). programs: without splits, where all
    sequences have about as many rows.
    """
    at_once = _PROGRAMS_A_PROCESSOR * processors
    most = max(1, min(keys // _KEYS_A_SPLIT, _MAX_SPLITS))
    busy = [programs * splits / (-(-programs * splits // at_once) * at_once) for splits in range(1, most + 1)]
    return next(splits for splits, share in enumerate(busy, start=1) if share >= 0.85 * max(busy))


def _processors(device: torch.device) -> int:
    from kernels.triton.target import processors

    return processors(device)
