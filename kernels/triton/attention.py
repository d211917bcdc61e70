"""Paged variable-length attention on the device: prefill chunks, decode rows, verification and draft blocks in one launch.

A program takes one tile of query rows of one key head, all query heads of that head together (grouped heads read keys once), and
walks its stretch of the keys with a running softmax (FlashAttention-2, arXiv 2307.08691). Stretches of one row, from splitting keys and
from shared prefixes, are merged by their log-sum-exp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.triton import tuning
from kernels.triton.attention_plan import DevicePlan, plan_attention
from kernels.triton.fp8 import widen
from kernels.triton.target import converts_fp8, needs_wide_dot

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEAR = 1 << 31
"""Numbers of a cache from which on their places take more than 32 bits."""
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _walk(
    acc, peak, total, q, k_head, v_head, table, stride_kb, stride_kt, stride_vb, stride_vt,
    begin, end, limit, positions, real, dims, real_dims, score_scale, soft_cap, window,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, ALIKE: tl.constexpr, NEAR: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    AHEAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """score_scale: to base 2, except with a cap, whose scores get there by themselves. AHEAD: page numbers are read a step before they are
    used; begin and end are then whole tiles, which are whole pages.
    """
    lines = tl.arange(0, BLOCK_N)
    # Walks begin with a page, so where tiles are whole pages only the first of a tile depends on where it is.
    whole: tl.constexpr = BLOCK_N % PAGE == 0
    within = lines % PAGE
    if AHEAD:
        pages = tl.load(table + begin // PAGE + lines // PAGE, mask=begin + lines < end, other=0)
    for start in range(begin, end, BLOCK_N):
        keys = start + lines
        inside = keys < limit
        page = keys // PAGE
        if whole:
            page = start // PAGE + lines // PAGE
        else:
            within = keys % PAGE
        if MASKED:
            pages = tl.load(table + page, mask=inside, other=0)
        elif not AHEAD:
            pages = tl.load(table + page)
        # A third of the loop would be the arithmetic of these: 32 bits where they do, and once for keys and values that lie alike.
        if not NEAR:
            pages = pages.to(tl.int64)
        k_at = (pages * stride_kb + within * stride_kt)[:, None] + dims[None, :]
        v_at = k_at
        if not ALIKE:
            v_at = (pages * stride_vb + within * stride_vt)[:, None] + dims[None, :]
        if AHEAD:
            # A step before it is used, so that no load waits for another: the last step reads its own once more.
            pages = tl.load(table + tl.minimum(start + BLOCK_N, end - BLOCK_N) // PAGE + lines // PAGE)
        if MASKED:
            there = inside[:, None] & real_dims[None, :]
            k = tl.load(k_head + k_at, mask=there, other=0)
            v = tl.load(v_head + v_at, mask=there, other=0)
        elif EVEN:
            k = tl.load(k_head + k_at)
            v = tl.load(v_head + v_at)
        else:
            k = tl.load(k_head + k_at, mask=real_dims[None, :], other=0)
            v = tl.load(v_head + v_at, mask=real_dims[None, :], other=0)
        if FP8:
            k = widen(k, NATIVE).to(q.dtype)
            v = widen(v, NATIVE).to(q.dtype)
        if WIDE:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        factor = score_scale
        if CAPPED:
            # tanh through the exponential of a number that cannot overflow.
            z = scores * score_scale / soft_cap
            small = tl.exp(-2.0 * tl.abs(z))
            size = (1.0 - small) / (1.0 + small)
            scores = tl.where(z < 0.0, -size, size)
            factor = soft_cap * 1.4426950408889634
        if MASKED:
            visible = real[:, None] & inside[None, :]
            if CAUSAL:
                visible = visible & (keys[None, :] <= positions[:, None])
            if WINDOWED:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        # Scaled where the peak is taken off: one multiplication and addition a score.
        higher = tl.maximum(peak, tl.max(scores, axis=1) * factor)
        anchor = higher
        if MASKED:
            # A row that has seen nothing yet keeps a peak of -inf; subtracting 0 instead keeps NaN out.
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * factor - anchor[:, None])
        fade = tl.exp2(peak - anchor)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = higher
    return acc, peak, total


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "stride_table", "window", "splits"])
def _attention(
    q, k_cache, v_cache, out, part, part_lse, k_scale, v_scale, tables, tile_unit, tile_row, row_end, key_begin, key_end,
    table_row, offset, num_sequences, num_rows, stride_q, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_table, scale, soft_cap, window, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, AHEAD: tl.constexpr, ALIKE: tl.constexpr,
    NEAR: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PARTIAL: tl.constexpr, SHARED: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # The last rows of a prompt see most keys: who takes longest begins first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    unit = tl.load(tile_unit + tile)
    if unit < 0:
        return
    first_row = tl.load(tile_row + tile)
    end_row = tl.load(row_end + unit)
    shift = tl.load(offset + unit)
    begin = tl.load(key_begin + unit)
    limit = tl.load(key_end + unit)
    own = unit < num_sequences  # else a shared prefix, in full view of every row

    lines = tl.arange(0, BLOCK_M)
    rows = first_row + lines // GROUP
    heads = kv_head * GROUP + lines % GROUP
    real = (lines // GROUP < BLOCK_Q) & (rows < end_row)
    alone = begin == 0  # no prefix of the unit's keys is walked for its whole group
    dims = tl.arange(0, BLOCK_D)
    real_dims = dims < DIM
    q_at = rows.to(tl.int64) * stride_q + heads * DIM
    queries = tl.load(q + q_at[:, None] + dims[None, :], mask=real[:, None] & real_dims[None, :], other=0.0)
    if FP8 and queries.dtype == tl.bfloat16:
        # float16 holds every e4m3 number, and widening to it is one instruction for two of them.
        queries = tl.minimum(tl.maximum(queries.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    if WIDE:
        queries = queries.to(tl.float32)

    last_row = tl.minimum(first_row + BLOCK_Q, end_row) - 1
    sees_all = limit  # keys before it are seen by every row of the tile
    if CAUSAL:
        if own:
            limit = tl.minimum(limit, last_row + shift + 1)
            sees_all = tl.minimum(limit, first_row + shift + 1)
    if WINDOWED:
        begin = tl.maximum(begin, first_row + shift - window + 1) // BLOCK_N * BLOCK_N
        begin = tl.maximum(begin, 0)
        sees_all = begin  # the window's lower edge cuts everywhere
    # Every row of a shared prefix sees all of it, so its positions stand past every key.
    positions = tl.where(own, rows + shift, 2147483647 // 2)
    length = tl.maximum(limit - begin, 0)
    stretch = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    low = begin + split * stretch
    high = tl.minimum(low + stretch, limit)
    middle = tl.minimum(low + tl.maximum(tl.minimum(high, sees_all) - low, 0) // BLOCK_N * BLOCK_N, high)

    score_scale = scale
    if FP8:
        score_scale = score_scale * tl.load(k_scale + kv_head)
    if not CAPPED:
        score_scale = score_scale * 1.4426950408889634
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    table = tables + tl.load(table_row + unit).to(tl.int64) * stride_table
    k_head = k_cache + kv_head.to(tl.int64) * stride_kh
    v_head = v_cache + kv_head.to(tl.int64) * stride_vh
    acc, peak, total = _walk(
        acc, peak, total, queries, k_head, v_head, table, stride_kb, stride_kt, stride_vb, stride_vt,
        low, middle, limit, positions, real, dims, real_dims, score_scale, soft_cap, window,
        BLOCK_N, PAGE, ALIKE, NEAR, BLOCK_D == DIM, False, AHEAD and BLOCK_N % PAGE == 0, CAUSAL, WINDOWED, CAPPED, FP8, NATIVE, WIDE,
    )  # fmt: skip
    acc, peak, total = _walk(
        acc, peak, total, queries, k_head, v_head, table, stride_kb, stride_kt, stride_vb, stride_vt,
        middle, high, high, positions, real, dims, real_dims, score_scale, soft_cap, window,
        BLOCK_N, PAGE, ALIKE, NEAR, BLOCK_D == DIM, True, False, CAUSAL, WINDOWED, CAPPED, FP8, NATIVE, WIDE,
    )  # fmt: skip

    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    if FP8:
        acc = acc * tl.load(v_scale + kv_head)
    o_at = (rows.to(tl.int64) * HEADS + heads) * DIM
    if PARTIAL:
        level = split + tl.where(own, 0, splits)
        p_at = level.to(tl.int64) * num_rows * HEADS + rows.to(tl.int64) * HEADS + heads
        nowhere = tl.full([BLOCK_M], float("-inf"), tl.float32)
        lse = tl.where(nothing, nowhere, (peak + tl.log2(tl.where(nothing, 1.0, total))) * _LN2)
        tl.store(part_lse + p_at, lse, mask=real)
        if SHARED:
            # Nobody writes the second level of rows without a group.
            if own & alone:
                above = (split + splits).to(tl.int64) * num_rows * HEADS + rows.to(tl.int64) * HEADS + heads
                tl.store(part_lse + above, nowhere, mask=real)
        tl.store(part + p_at[:, None] * DIM + dims[None, :], acc, mask=real[:, None] & real_dims[None, :])
    else:
        tl.store(out + o_at[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=real[:, None] & real_dims[None, :])


@triton.jit(do_not_specialize=["lines", "parts"])
def _merge(part, part_lse, out, lines, parts, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_P)
    lse = tl.load(part_lse + index * lines + line, mask=index < parts, other=float("-inf"))
    peak = tl.max(lse, axis=0)
    weights = tl.where(lse == float("-inf"), 0.0, tl.exp(lse - tl.where(peak == float("-inf"), 0.0, peak)))
    total = tl.sum(weights, axis=0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    dims = tl.arange(0, BLOCK_D)
    at = (index.to(tl.int64) * lines + line)[:, None] * DIM + dims[None, :]
    # A part without weight was perhaps never written: it is not read.
    values = tl.load(part + at, mask=(weights > 0.0)[:, None] & (dims < DIM)[None, :], other=0.0)
    tl.store(out + line * DIM + dims, tl.sum(values * weights[:, None], axis=0).to(out.dtype.element_ty), mask=dims < DIM)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    soft_cap: float | None = None,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.reference.paged_attention`, for a step that `plan_attention` has planned. Returns [T, heads, head_dim], contiguous.

    q: float16, bfloat16 or float32; a slice of a fused row is read where it is. Caches: q's dtype, or float8_e4m3fn with `k_scale` and
    `v_scale` float32 [kv_heads]. Rows past query_start[-1] are left as they were allocated. Raises ValueError naming what does not fit.
    """
    _check(q, k_cache, v_cache, k_scale, v_scale)
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    num_rows, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    out = torch.empty((num_rows, heads, dim), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    parts = plan.splits * (2 if plan.shared else 1)
    partial = parts > 1
    part = q.new_empty((parts, num_rows, heads, dim) if partial else (1,), dtype=torch.float32)
    lse = q.new_empty((parts, num_rows, heads) if partial else (1,), dtype=torch.float32)
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    key = f"{dim}/{group}/{plan.block_m}/{page}/{str(q.dtype)[6:]}/{str(k_cache.dtype)[6:]}"
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    unit_scale = lse if k_scale is None or v_scale is None else None
    near = max(k_cache.numel(), v_cache.numel()) < _NEAR
    grid = (len(plan.tile_unit), kv_heads, plan.splits)

    def launch(config: tuning.Config) -> None:
        _attention[grid](
            q, k_cache, v_cache, out, part, lse,
            k_scale if unit_scale is None else unit_scale, v_scale if unit_scale is None else unit_scale,
            plan.tables, plan.tile_unit, plan.tile_row, plan.row_end, plan.key_begin, plan.key_end, plan.table_row, plan.offset,
            plan.num_sequences, num_rows, q.stride(0), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), v_cache.stride(0),
            v_cache.stride(1), v_cache.stride(2), plan.tables.stride(0), float(scale), float(soft_cap or 0.0), plan.window or 0,
            plan.splits,
            HEADS=heads, GROUP=group, DIM=dim, BLOCK_D=max(triton.next_power_of_2(dim), 16), BLOCK_M=plan.block_m,
            BLOCK_Q=plan.block_q, BLOCK_N=config["BLOCK_N"], PAGE=page, AHEAD=config["AHEAD"],
            ALIKE=k_cache.stride() == v_cache.stride(), NEAR=near, CAUSAL=plan.causal, WINDOWED=plan.window is not None,
            CAPPED=soft_cap is not None, PARTIAL=partial, SHARED=plan.shared, FP8=fp8, NATIVE=converts_fp8(q.device),
            WIDE=needs_wide_dot(q.dtype), num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip

    tuning.run("attention", key, q.device, list(_configs(plan.block_m, dim, q.dtype)), launch)
    if partial:
        lines = num_rows * heads
        block_d, block_p = triton.next_power_of_2(dim), triton.next_power_of_2(parts)
        _merge[(lines,)](
            part, lse, out, lines, parts, DIM=dim, BLOCK_D=block_d, BLOCK_P=block_p, num_warps=min(max(block_d * block_p // 2048, 1), 8)
        )
    return out


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.reference.paged_attention`; plans and runs one layer."""
    slots = query_start.new_zeros(len(q), dtype=torch.int64)
    plan = plan_attention(block_tables, query_start, kv_lengths, slots, cache=k_cache, num_heads=q.shape[1], window=window, causal=causal)
    return attention(q, k_cache, v_cache, plan, scale, soft_cap, k_scale=k_scale, v_scale=v_scale)


def _configs(block_m: int, dim: int, dtype: torch.dtype) -> Iterator[tuning.Config]:
    """The first is what runs untuned. Decode tiles are bound by memory: loads in flight, and room for two programs a processor, so that one
    reads while the other begins or ends. Prefill tiles are bound by arithmetic and by registers: two programs of 4 warps a processor, of
    which one multiplies while the other exponentiates, or one of 8 warps, with fewer instructions a key.

    With page numbers read ahead, `num_stages - 1` tiles are on their way while one is worked on; without, one (3 stages: a tile's
    page numbers come before it; 4 are no different), and none of the page numbers takes registers.
    """
    if dtype == torch.float32:
        # Products in full precision are multiplied out: 128 rows by 32 keys on 4 warps compile for 15 s and more, by 16 on 8 for 2.
        keys, warps = (16, 8) if block_m >= 128 else (32, 4)
        yield {"BLOCK_N": keys, "num_warps": warps, "num_stages": 2, "AHEAD": 1}
        return
    if dim > 128:
        shapes = [(64, 8, 2, 1), (32, 4, 3, 1), (32, 8, 3, 0), (64, 4, 2, 0), (16, 4, 2, 1)]
    elif block_m >= 64:
        shapes = [(64, 4, 3, 0), (64, 4, 2, 1), (128, 8, 2, 1), (128, 8, 3, 0), (64, 8, 2, 1), (32, 4, 3, 1)]
    else:
        shapes = [(128, 4, 2, 1), (128, 4, 3, 0), (64, 4, 3, 1), (64, 4, 2, 1), (128, 8, 2, 1), (32, 4, 4, 1), (128, 4, 3, 1)]
    if dim <= 64:
        shapes = [(128, *shapes[0][1:]), *shapes]
    for block_n, warps, stages, ahead in dict.fromkeys(shapes):
        yield {"BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, "AHEAD": ahead}


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"queries must be float16, bfloat16 or float32, got {q.dtype}")
    if q.shape[1] % k_cache.shape[1] or q.shape[2] != k_cache.shape[3]:
        raise ValueError(f"queries {tuple(q.shape)} do not fit keys {tuple(k_cache.shape)}")
    if k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        raise ValueError(f"keys {tuple(k_cache.shape)} {k_cache.dtype} and values {tuple(v_cache.shape)} {v_cache.dtype} must be alike")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(f"head_dim must be contiguous in the caches, got strides {k_cache.stride()} and {v_cache.stride()}")
    if k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"caches must be {q.dtype} like the queries, or float8_e4m3fn, got {k_cache.dtype}")
    if (k_cache.dtype == torch.float8_e4m3fn) != (k_scale is not None and v_scale is not None):
        raise ValueError(f"k_scale and v_scale belong to a float8_e4m3fn cache and to no other, got a cache of {k_cache.dtype}")
    for scale in (k_scale, v_scale):
        if scale is not None and scale.shape != (k_cache.shape[1],):
            raise ValueError(f"scales must be [kv_heads] = [{k_cache.shape[1]}], got {tuple(scale.shape)}")
