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
    BLOCK_H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Head h of a row: a query below HEADS, a key below HEADS + KV_HEADS, else a value. Its first ROTATED numbers are two halves."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    own = tl.where(is_q, head, tl.where(is_k, head - HEADS, head - HEADS - KV_HEADS)) * DIM
    halves = tl.arange(0, HALF)
    half_width: tl.constexpr = ROTATED // 2
    in_half = (halves < half_width)[None, :]
    rest = ROTATED + tl.arange(0, REST)
    in_rest = (rest < DIM)[None, :]
    first = _load(q, k, v, row, stride_q, stride_k, stride_v, own, halves, is_q, is_k, is_v, in_half)
    second = _load(q, k, v, row, stride_q, stride_k, stride_v, own, halves + half_width, is_q, is_k, is_v, in_half)
    other = tl.zeros([BLOCK_H, REST], tl.float32)
    if ROTATED < DIM:
        other = _load(q, k, v, row, stride_q, stride_k, stride_v, own, rest, is_q, is_k, is_v, in_rest)
    if Q_NORM or K_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(other * other, 1)
        factor = tl.rsqrt(squares / DIM + eps)
        normed = (is_q & Q_NORM) | (is_k & K_NORM)
        factor = tl.where(normed, factor, 1.0)[:, None]
        # Rounded to the model's type in between, as the separate ops do.
        kind = q_out.dtype.element_ty
        first = _scaled(first, factor, q_norm, k_norm, halves, is_q, is_k, in_half, Q_NORM, K_NORM).to(kind).to(tl.float32)
        second = _scaled(second, factor, q_norm, k_norm, halves + half_width, is_q, is_k, in_half, Q_NORM, K_NORM).to(kind).to(tl.float32)
        other = _scaled(other, factor, q_norm, k_norm, rest, is_q, is_k, in_rest, Q_NORM, K_NORM).to(kind).to(tl.float32)
    turned_first, turned_second = first, second
    if TURNS:
        angle = row * stride_angle + halves
        c1 = tl.load(cos + angle, mask=halves < half_width, other=0.0).to(tl.float32)[None, :]
        c2 = tl.load(cos + angle + half_width, mask=halves < half_width, other=0.0).to(tl.float32)[None, :]
        s1 = tl.load(sin + angle, mask=halves < half_width, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(sin + angle + half_width, mask=halves < half_width, other=0.0).to(tl.float32)[None, :]
        turns = (is_q | is_k)[:, None]
        turned_first = tl.where(turns, first * c1 + second * s1, first)
        turned_second = tl.where(turns, second * c2 + first * s2, second)
    if HEADS > 0:
        at = (row * HEADS * DIM + own)[:, None]
        q_mask = is_q[:, None]
        tl.store(q_out + at + halves[None, :], turned_first.to(q_out.dtype.element_ty), mask=q_mask & in_half)
        tl.store(q_out + at + half_width + halves[None, :], turned_second.to(q_out.dtype.element_ty), mask=q_mask & in_half)
        if ROTATED < DIM:
            tl.store(q_out + at + rest[None, :], other.to(q_out.dtype.element_ty), mask=q_mask & in_rest)
    slot = tl.load(slots + row)
    if slot >= 0:
        cache_head = own // DIM
        k_at = slot // PAGE * stride_kb + slot % PAGE * stride_kt + cache_head * stride_kh
        v_at = slot // PAGE * stride_vb + slot % PAGE * stride_vt + cache_head * stride_vh
        if FP8:
            scale = tl.load(k_scale + cache_head, mask=is_k, other=1.0) * tl.load(v_scale + cache_head, mask=is_v, other=1.0)
            turned_first = turned_first / scale[:, None]
            turned_second = turned_second / scale[:, None]
            other = other / scale[:, None]
        _store(k_cache, v_cache, k_at, v_at, halves, turned_first, is_k, is_v, in_half, FP8, NATIVE)
        _store(k_cache, v_cache, k_at, v_at, halves + half_width, turned_second, is_k, is_v, in_half, FP8, NATIVE)
        if ROTATED < DIM:
            _store(k_cache, v_cache, k_at, v_at, rest, other, is_k, is_v, in_rest, FP8, NATIVE)


@triton.jit
def _load(q, k, v, row, stride_q, stride_k, stride_v, own, columns, is_q, is_k, is_v, real):
    at = own[:, None] + columns[None, :]
    a = tl.load(q + row * stride_q + at, mask=is_q[:, None] & real, other=0.0).to(tl.float32)
    b = tl.load(k + row * stride_k + at, mask=is_k[:, None] & real, other=0.0).to(tl.float32)
    c = tl.load(v + row * stride_v + at, mask=is_v[:, None] & real, other=0.0).to(tl.float32)
    return a + b + c


@triton.jit
def _scaled(x, factor, q_norm, k_norm, columns, is_q, is_k, real, Q_NORM: tl.constexpr, K_NORM: tl.constexpr):
    at = columns[None, :]
    weight = 1.0 + tl.zeros_like(x)
    if Q_NORM:
        weight = tl.where(is_q[:, None], tl.load(q_norm + at, mask=real, other=0.0).to(tl.float32), weight)
    if K_NORM:
        weight = tl.where(is_k[:, None], tl.load(k_norm + at, mask=real, other=0.0).to(tl.float32), weight)
    return x * factor * weight


@triton.jit
def _store(k_cache, v_cache, k_at, v_at, columns, x, is_k, is_v, real, FP8: tl.constexpr, NATIVE: tl.constexpr):
    if FP8:
        stored = narrow(x, NATIVE)
    else:
        stored = x.to(k_cache.dtype.element_ty)
    tl.store(k_cache + k_at[:, None] + columns[None, :], stored, mask=is_k[:, None] & real)
    tl.store(v_cache + v_at[:, None] + columns[None, :], stored, mask=is_v[:, None] & real)


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
    block_h = min(triton.next_power_of_2(num_heads + 2 * kv_heads), _HEADS_A_PROGRAM)
    grid = (len(k), triton.cdiv(num_heads + 2 * kv_heads, block_h))
    angles = k if cos is None or sin is None else None
    _write[grid](
        k if q is None else q, k, v, out, k_cache, v_cache, cos if angles is None else k, sin if angles is None else k,
        k if q_norm is None else q_norm, k if k_norm is None else k_norm, k if k_scale is None else k_scale,
        k if v_scale is None else v_scale, slots, float(eps),
        k.stride(0) if q is None else q.stride(0), k.stride(0), v.stride(0), 0 if cos is None else cos.stride(0),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        HEADS=num_heads, KV_HEADS=kv_heads, DIM=dim, ROTATED=halves, TURNS=rotated > 0, PAGE=page, BLOCK_H=block_h,
        HALF=triton.next_power_of_2(max(halves // 2, 1)), REST=triton.next_power_of_2(max(dim - halves, 1)),
        Q_NORM=q_norm is not None, K_NORM=k_norm is not None, FP8=fp8, NATIVE=converts_fp8(k.device), num_warps=4,
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
