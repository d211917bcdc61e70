"""Keys and values into the paged cache, with per-head normalisation and rotation on the way: each number read once, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.triton import tuning
from kernels.triton.fp8 import narrow
from kernels.triton.target import converts_fp8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernels.triton.attention_plan import DevicePlan

_HEADS_A_PROGRAM = 8
_MANY = 1024
"""Rows from which on the device is full, and several share a program."""


@triton.jit(do_not_specialize=["rows"])
def _write(
    q, k, v, q_out, k_cache, v_cache, cos, sin, q_norm, k_norm, k_scale, v_scale, slots, eps, rows,
    stride_q, stride_k, stride_v, stride_angle, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, TURNS: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Some heads of some rows, all of them queries, keys or values; a line is one head of one row. The first ROTATED numbers of a line are
    two halves. Angles and weights are read in the layout of the numbers that they belong to, for all lines (from the L1 cache): spread
    from one line to the others they would go through shared memory.
    """
    part = tl.program_id(1)
    is_q = part < Q_PARTS
    is_k = (part >= Q_PARTS) & (part < Q_PARTS + KV_PARTS)
    lines = tl.arange(0, ROWS * BLOCK_H)
    row = tl.program_id(0).to(tl.int64) * ROWS + lines // BLOCK_H
    source, stride, count = v, stride_v, KV_HEADS
    base = (part - Q_PARTS - KV_PARTS) * BLOCK_H
    if is_q:
        source, stride, count = q, stride_q, HEADS
        base = part * BLOCK_H
    if is_k:
        source, stride = k, stride_k
        base = (part - Q_PARTS) * BLOCK_H
    head = base + lines % BLOCK_H
    known = (head < count) & (row < rows)
    half: tl.constexpr = ROTATED // 2
    columns = tl.arange(0, HALF)
    inside = known[:, None]
    turns = (row < rows)[:, None]
    if half != HALF:
        inside = known[:, None] & (columns < half)[None, :]
        turns = (row < rows)[:, None] & (columns < half)[None, :]
    rest = ROTATED + tl.arange(0, REST)
    in_rest = known[:, None] & (rest < DIM)[None, :]
    at = source + (row * stride + head * DIM)[:, None]
    # All loads before the first use of any: what a program waits for is then one of them, not their sum.
    first = tl.load(at + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.zeros([ROWS * BLOCK_H, REST], tl.float32)
    if ROTATED < DIM:
        other = tl.load(at + rest[None, :], mask=in_rest, other=0.0).to(tl.float32)
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    if TURNS:
        angle = (row * stride_angle)[:, None] + columns[None, :]
        c1 = tl.load(cos + angle, mask=turns, other=0.0).to(tl.float32)
        c2 = tl.load(cos + angle + half, mask=turns, other=0.0).to(tl.float32)
        s1 = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        s2 = tl.load(sin + angle + half, mask=turns, other=0.0).to(tl.float32)
    # Rounded to the model's type after the norm, as the separate ops do.
    kind = q_out.dtype.element_ty
    if Q_NORM or K_NORM:
        weight = q_norm
        if is_k:
            weight = k_norm
        w_at = lines[:, None] * 0 + columns[None, :]
        w1 = tl.load(weight + w_at, mask=turns, other=0.0).to(tl.float32)
        w2 = tl.load(weight + half + w_at, mask=turns, other=0.0).to(tl.float32)
        if (is_q & Q_NORM) | (is_k & K_NORM):
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(other * other, 1)
            factor = tl.rsqrt(squares / DIM + eps)[:, None]
            first = (first * factor * w1).to(kind).to(tl.float32)
            second = (second * factor * w2).to(kind).to(tl.float32)
            if ROTATED < DIM:
                w3 = tl.load(weight + rest, mask=rest < DIM, other=0.0).to(tl.float32)[None, :]
                other = (other * factor * w3).to(kind).to(tl.float32)
    if TURNS:
        if is_q | is_k:
            turned = first * c1 + second * s1
            second = second * c2 + first * s2
            first = turned
    if is_q:
        to = q_out + (row * (HEADS * DIM) + head * DIM)[:, None]
        tl.store(to + columns[None, :], first.to(kind), mask=inside)
        tl.store(to + half + columns[None, :], second.to(kind), mask=inside)
        if ROTATED < DIM:
            tl.store(to + rest[None, :], other.to(kind), mask=in_rest)
    else:
        kept = (slot >= 0)[:, None]
        cache, scales, stride_b, stride_h, stride_t = v_cache, v_scale, stride_vb, stride_vh, stride_vt
        if is_k:
            cache, scales, stride_b, stride_h, stride_t = k_cache, k_scale, stride_kb, stride_kh, stride_kt
        target = cache + (slot // PAGE * stride_b + slot % PAGE * stride_t + head * stride_h)[:, None]
        if FP8:
            scale = tl.load(scales + head, mask=known, other=1.0)[:, None]
            first, second, other = first / scale, second / scale, other / scale
        tl.store(target + columns[None, :], _stored(first, k_cache, FP8, NATIVE), mask=inside & kept)
        tl.store(target + half + columns[None, :], _stored(second, k_cache, FP8, NATIVE), mask=inside & kept)
        if ROTATED < DIM:
            tl.store(target + rest[None, :], _stored(other, k_cache, FP8, NATIVE), mask=in_rest & kept)


@triton.jit
def _stored(x, cache, FP8: tl.constexpr, NATIVE: tl.constexpr):
    if FP8:
        return narrow(x, NATIVE)
    return x.to(cache.dtype.element_ty)


def kv_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: DevicePlan) -> None:
    """As `kernels.reference.kv_write`, at `plan.slots`. k, v: [T, kv_heads, head_dim]; slices of a fused row are read where they are."""
    k, v = (rows if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] else rows.contiguous() for rows in (k, v))
    _launch(None, k, v, None, None, plan.slots, k_cache, v_cache, num_heads=0)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.reference.rotary_kv_write`. Raises ValueError naming what does not fit."""
    kv_heads, _, dim = k_cache.shape[1:]
    if qkv.dim() != 2 or qkv.shape[1] != (num_heads + 2 * kv_heads) * dim:
        raise ValueError(f"rows of {num_heads} + 2 * {kv_heads} heads of {dim} have another width than {tuple(qkv.shape)}")
    heads = qkv.unflatten(1, (-1, dim))
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    return _launch(q, k, v, cos, sin, slots, k_cache, v_cache, num_heads, q_norm, k_norm, eps, k_scale, v_scale)


def _launch(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    kv_heads, page, dim = k_cache.shape[1:]
    rotated = 0 if cos is None else cos.shape[1]
    _check(k, v, cos, sin, slots, k_cache, v_cache, rotated, k_scale, v_scale)
    out = k.new_empty(len(k), num_heads, dim)
    if len(k) == 0:
        return out
    # Without a rotation the halves are only a way to cut a head in two.
    halves = rotated or dim - dim % 2
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    if fp8:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    block_h = min(max(triton.next_power_of_2(kv_heads), _HEADS_A_PROGRAM // 2), _HEADS_A_PROGRAM)
    q_parts, kv_parts = triton.cdiv(num_heads, block_h), triton.cdiv(kv_heads, block_h)
    half = triton.next_power_of_2(max(halves // 2, 1))
    angles = k if cos is None or sin is None else None

    def launch(config: tuning.Config) -> None:
        height = config["ROWS"]
        _write[(triton.cdiv(len(k), height), q_parts + 2 * kv_parts)](
            k if q is None else q, k, v, out, k_cache, v_cache, cos if angles is None else k, sin if angles is None else k,
            k if q_norm is None else q_norm, k if k_norm is None else k_norm, k if k_scale is None else k_scale,
            k if v_scale is None else v_scale, slots, float(eps), len(k),
            k.stride(0) if q is None else q.stride(0), k.stride(0), v.stride(0), 0 if cos is None else cos.stride(0),
            k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
            HEADS=num_heads, KV_HEADS=kv_heads, DIM=dim, ROTATED=halves, TURNS=rotated > 0, PAGE=page, ROWS=height, BLOCK_H=block_h,
            Q_PARTS=q_parts, KV_PARTS=kv_parts, HALF=half, REST=triton.next_power_of_2(max(dim - halves, 1)), Q_NORM=q_norm is not None,
            K_NORM=k_norm is not None, FP8=fp8, NATIVE=converts_fp8(k.device), num_warps=config["num_warps"],
        )  # fmt: skip

    many = len(k) >= _MANY
    kinds = f"{str(k.dtype)[6:]}/{'fp8' if fp8 else 'plain'}"
    key = f"{num_heads}/{kv_heads}/{dim}/{rotated}/{'many' if many else 'few'}/{kinds}"
    tuning.run("rotary_kv_write", key, k.device, list(_configs(block_h * half, many=many)), launch)
    return out


def _configs(numbers: int, *, many: bool) -> Iterator[tuning.Config]:
    """numbers: of a row, in one half of a program's heads. A thread holds 8 of each half (16-byte accesses), or twice that."""
    for rows, share in ((4, 8), (2, 8), (4, 16), (8, 16)) if many else ((1, 8), (1, 16), (1, 4)):
        yield {"ROWS": rows, "num_warps": min(max(rows * numbers // (32 * share), 1), 8)}


def _check(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rotated: int,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    kv_heads, _, dim = k_cache.shape[1:]
    if k.shape != v.shape or k.shape[1:] != (kv_heads, dim):
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} must be [T, {kv_heads}, {dim}] like the cache")
    if k.stride(2) != 1 or k.stride(1) != dim or v.stride(1) != dim:
        raise ValueError(f"heads must lie side by side, got strides {k.stride()} and {v.stride()}")
    if slots.shape != (len(k),):
        raise ValueError(f"{len(k)} rows need as many slots, got {tuple(slots.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together")
    if cos is not None and sin is not None and (rotated % 2 or rotated > dim or cos.shape != sin.shape or len(cos) != len(k)):
        raise ValueError(f"cos and sin must be [{len(k)}, R] with an even R <= {dim}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if (k_cache.dtype == torch.float8_e4m3fn) != (k_scale is not None and v_scale is not None):
        raise ValueError(f"k_scale and v_scale belong to a float8_e4m3fn cache and to no other, got a cache of {k_cache.dtype}")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(f"head_dim must be contiguous in the caches, got strides {k_cache.stride()} and {v_cache.stride()}")
