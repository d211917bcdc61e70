"""Keys and values into the paged cache, with per-head normalisation and rotation on the way: each number read once, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kernels.triton.fp8 import narrow
from kernels.triton.target import converts_fp8

if TYPE_CHECKING:
    from kernels.triton.attention_plan import DevicePlan

_HEADS_A_PROGRAM = 8


@triton.jit
def _write(
    q, k, v, q_out, k_cache, v_cache, cos, sin, q_norm, k_norm, k_scale, v_scale, slots, eps,
    stride_q, stride_k, stride_v, stride_angle, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTATED: tl.constexpr, TURNS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Some heads of a row, all of them queries, keys or values. Of each, the first ROTATED numbers are two halves."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    is_q = part < Q_PARTS
    is_k = (part >= Q_PARTS) & (part < Q_PARTS + KV_PARTS)
    source, count = v + row * stride_v, KV_HEADS
    head = (part - Q_PARTS - KV_PARTS) * BLOCK_H + tl.arange(0, BLOCK_H)
    if is_q:
        source, count = q + row * stride_q, HEADS
        head += (Q_PARTS + KV_PARTS) * BLOCK_H
    if is_k:
        source = k + row * stride_k
        head += KV_PARTS * BLOCK_H
    known = (head < count)[:, None]
    half: tl.constexpr = ROTATED // 2
    columns = tl.arange(0, HALF)
    inside = known
    if half != HALF:
        inside = known & (columns < half)[None, :]
    rest = ROTATED + tl.arange(0, REST)
    in_rest = known & (rest < DIM)[None, :]
    at = source + head[:, None] * DIM
    # All loads before the first use of any: what a program waits for is then one of them, not their sum.
    first = tl.load(at + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.zeros([BLOCK_H, REST], tl.float32)
    if ROTATED < DIM:
        other = tl.load(at + rest[None, :], mask=in_rest, other=0.0).to(tl.float32)
    slot = tl.load(slots + row)
    if TURNS:
        angle, turns = row * stride_angle + columns, columns < half
        c1 = tl.load(cos + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
        c2 = tl.load(cos + angle + half, mask=turns, other=0.0).to(tl.float32)[None, :]
        s1 = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(sin + angle + half, mask=turns, other=0.0).to(tl.float32)[None, :]
    # Rounded to the model's type after the norm, as the separate ops do.
    kind = q_out.dtype.element_ty
    if Q_NORM or K_NORM:
        weight = q_norm
        if is_k:
            weight = k_norm
        w1 = tl.load(weight + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + half + columns, mask=columns < half, other=0.0).to(tl.float32)[None, :]
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
        to = q_out + row * (HEADS * DIM) + head[:, None] * DIM
        tl.store(to + columns[None, :], first.to(kind), mask=inside)
        tl.store(to + half + columns[None, :], second.to(kind), mask=inside)
        if ROTATED < DIM:
            tl.store(to + rest[None, :], other.to(kind), mask=in_rest)
    else:
        if slot >= 0:
            target = v_cache + slot // PAGE * stride_vb + slot % PAGE * stride_vt + head[:, None] * stride_vh
            scales = v_scale
            if is_k:
                target = k_cache + slot // PAGE * stride_kb + slot % PAGE * stride_kt + head[:, None] * stride_kh
                scales = k_scale
            if FP8:
                scale = tl.load(scales + head, mask=head < count, other=1.0)[:, None]
                first, second, other = first / scale, second / scale, other / scale
            tl.store(target + columns[None, :], _stored(first, k_cache, FP8, NATIVE), mask=inside)
            tl.store(target + half + columns[None, :], _stored(second, k_cache, FP8, NATIVE), mask=inside)
            if ROTATED < DIM:
                tl.store(target + rest[None, :], _stored(other, k_cache, FP8, NATIVE), mask=in_rest)


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
    grid = (len(k), q_parts + 2 * kv_parts)
    angles = k if cos is None or sin is None else None
    _write[grid](
        k if q is None else q, k, v, out, k_cache, v_cache, cos if angles is None else k, sin if angles is None else k,
        k if q_norm is None else q_norm, k if k_norm is None else k_norm, k if k_scale is None else k_scale,
        k if v_scale is None else v_scale, slots, float(eps),
        k.stride(0) if q is None else q.stride(0), k.stride(0), v.stride(0), 0 if cos is None else cos.stride(0),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        HEADS=num_heads, KV_HEADS=kv_heads, DIM=dim, ROTATED=halves, TURNS=rotated > 0, PAGE=page, BLOCK_H=block_h, Q_PARTS=q_parts,
        KV_PARTS=kv_parts, HALF=half, REST=triton.next_power_of_2(max(dim - halves, 1)), Q_NORM=q_norm is not None,
        K_NORM=k_norm is not None, FP8=fp8, NATIVE=converts_fp8(k.device), num_warps=min(max(block_h * half // 256, 1), 4),
    )  # fmt: skip
    return out


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
