"""Paged variable-length attention from its definition, one sequence at a time; the reference of `kernels.triton.attention`.

The CPU path is `kernels.reference.attention`, which is tested against a definition of its own; this one takes the plain tensors of a step,
so that both can be asked the same question, in any float type up to float64.
"""

from __future__ import annotations

import torch


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
    """softmax(cap(scale * q k^T)) v for S sequences of any numbers of query rows; cap(s) = soft_cap * tanh(s / soft_cap).

    q: [T, heads, head_dim], heads a multiple of kv_heads; caches: [num_blocks, kv_heads, block_size, head_dim], the step's own keys
    and values already written; block_tables: int [S, widest]; query_start: int [S + 1]; kv_lengths: int [S]. The rows of sequence s
    are its last positions. A row sees all keys up to its own position (all keys of its sequence where not `causal`: a draft
    block over injected context), and with a window only the last `window` of those. k_scale, v_scale: float32 [kv_heads], what the
    stored numbers of an fp8 cache are multiplied with. Returns q's shape and dtype; rows past query_start[-1] are zero.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    out = torch.zeros_like(q)
    bounds = query_start.tolist()
    for s, length in enumerate(kv_lengths.tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        count = bounds[s + 1] - bounds[s]
        if count == 0:
            continue
        pages = block_tables[s, : -(-length // block_size)].long()
        k, v = (_read(cache[pages], per_head, length).to(wide) for cache, per_head in ((k_cache, k_scale), (v_cache, v_scale)))
        positions = torch.arange(length - count, length, device=q.device)[:, None]
        keys = torch.arange(length, device=q.device)[None]
        visible = keys <= positions if causal else torch.ones(count, length, dtype=torch.bool, device=q.device)
        if window is not None:
            visible = visible & (keys > positions - window)
        grouped = q[rows].to(wide).unflatten(1, (kv_heads, -1))
        scores = torch.einsum("qhgd,hkd->hgqk", grouped, k) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        out[rows] = torch.einsum("hgqk,hkd->qhgd", weights, v).flatten(1, 2).to(q.dtype)
    return out


def _read(pages: torch.Tensor, per_head: torch.Tensor | None, length: int) -> torch.Tensor:
    """[kv_heads, length, head_dim] of gathered blocks [W, kv_heads, block_size, head_dim]."""
    if per_head is not None:
        pages = pages.float() * per_head[None, :, None, None]
    return pages.permute(1, 0, 2, 3).flatten(1, 2)[:, :length]
