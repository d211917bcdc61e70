"""Paged, causal, variable-length attention with grouped heads, over the plan of `kernels.reference.attention_plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from kernels.reference.attention_plan import AttentionPlan, DenseGroup, RaggedGroup


def attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float, soft_cap: float | None = None
) -> torch.Tensor:
    """softmax(cap(scale * q k^T)) v of every query row against what the plan lets it see; cap(s) = soft_cap * tanh(s / soft_cap).

    q: [T, heads, head_dim]; caches: [num_blocks, kv_heads, block_size, head_dim], the step's own keys and values already written.
    Returns [T, heads, head_dim], contiguous. Reads each visible key once per query head (ragged) or once per group (dense).
    """
    if len(plan.ragged) == 1 and not plan.dense:
        return _ragged(q, k_cache, v_cache, plan.ragged[0], scale, soft_cap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for ragged in plan.ragged:
        out.index_copy_(0, ragged.rows, _ragged(q.index_select(0, ragged.rows), k_cache, v_cache, ragged, scale, soft_cap))
    for dense in plan.dense:
        out.index_copy_(0, dense.targets, _dense(q, k_cache, v_cache, dense, scale, soft_cap))
    return out


def _ragged(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: RaggedGroup, scale: float, soft_cap: float | None
) -> torch.Tensor:
    """q: [R, heads, head_dim], the group's rows in order."""
    num_rows, heads, head_dim = q.shape
    lines, keys = q.reshape(-1, head_dim), k_cache.view(-1, head_dim)
    group.pattern.values().zero_()  # beta = 0 still multiplies, and what an earlier layer left there may be infinite
    torch.sparse.sampled_addmm(group.pattern, lines, keys.t(), beta=0.0, alpha=scale, out=group.pattern)
    scores = _capped(group.pattern.values(), soft_cap)
    padded = scores.new_full((num_rows * heads, group.width), float("-inf"))
    padded.view(-1).index_copy_(0, group.cells, scores)
    weights = torch.softmax(padded, dim=-1).view(-1).index_select(0, group.cells)
    out = functional.embedding_bag(group.columns, v_cache.view(-1, head_dim), group.offsets, mode="sum", per_sample_weights=weights)
    return out.view(num_rows, heads, head_dim)


def _dense(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: DenseGroup, scale: float, soft_cap: float | None
) -> torch.Tensor:
    """Returns [real rows, heads, head_dim]."""
    heads, head_dim = q.shape[1:]
    num_blocks, kv_heads = k_cache.shape[:2]
    size = (group.num_sequences, kv_heads, -1, head_dim)
    k = k_cache.view(num_blocks * kv_heads, -1).index_select(0, group.blocks).view(size)
    v = v_cache.view(num_blocks * kv_heads, -1).index_select(0, group.blocks).view(size)
    grouped = (group.num_sequences, group.num_queries, kv_heads, heads // kv_heads, head_dim)
    # [S, Q, KV, G, D] -> [S, KV, G * Q, D]: the query heads of one key head become rows of one product.
    lines = q.index_select(0, group.rows).view(grouped).permute(0, 2, 3, 1, 4).reshape(size)
    if soft_cap is None:
        out = functional.scaled_dot_product_attention(lines, k, v, attn_mask=group.mask, scale=scale)
    else:
        scores = _capped(torch.matmul(lines, k.transpose(2, 3)) * scale, soft_cap) + group.mask
        out = torch.matmul(torch.softmax(scores.float(), dim=-1).to(v.dtype), v)
    out = out.view(group.num_sequences, kv_heads, heads // kv_heads, group.num_queries, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(-1, heads, head_dim).index_select(0, group.real)


def _capped(scores: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    return scores if soft_cap is None else torch.tanh(scores / soft_cap) * soft_cap
