"""From a fused query/key/value product to rotated queries and cached keys and values, as one op."""

from __future__ import annotations

import torch

from kernels.reference.rms_norm import rms_norm
from kernels.reference.rotary import rotary


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
    """Normalises queries and keys per head (where there are weights), rotates them, writes keys and values, returns the queries.

    qkv: [T, (num_heads + 2 kv_heads) * head_dim]; num_heads may be 0: context injected into a drafter has keys and values alone.
    cos, sin: [T, R] as `kernels.rotary` takes them, None for no rotation. slots: int64 [T], negative for rows whose keys go nowhere.
    Caches: [num_blocks, kv_heads, block_size, head_dim], changed in place; fp8 ones hold numbers divided by `k_scale` and `v_scale`
    float32 [kv_heads]. Returns [T, num_heads, head_dim].
    """
    kv_heads, block_size, dim = k_cache.shape[1:]
    heads = qkv.view(len(qkv), num_heads + 2 * kv_heads, dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    if cos is not None and sin is not None:
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    known = slots >= 0
    block, place = slots[known] // block_size, slots[known] % block_size
    for cache, rows, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        values = rows[known]
        if scale is not None:
            values = (values.float() / scale[:, None]).clamp(-448.0, 448.0)
        if cache.dtype == torch.float8_e4m3fn:  # index_put is not made for it
            cache.view(torch.uint8)[block, :, place] = values.to(cache.dtype).view(torch.uint8)
        else:
            cache[block, :, place] = values.to(cache.dtype)
    return q.contiguous()
