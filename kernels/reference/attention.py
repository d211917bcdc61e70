"""Paged, causal, variable-length attention with grouped heads, over the plan of `kernels.reference.attention_plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from kernels.reference.attention_plan import DefinedPlan
from kernels.reference.paged_attention import paged_attention

if TYPE_CHECKING:
    from kernels.reference.attention_plan import AttentionPlan, DenseGroup, RaggedGroup, SharedGroup


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan | DefinedPlan,
    scale: float,
    soft_cap: float | None = None,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(cap(scale * q k^T)) v of every query row against what the plan lets it see; cap(s) = soft_cap * tanh(s / soft_cap).

    q: [T, heads, head_dim]; caches: [num_blocks, kv_heads, block_size, head_dim], the step's own keys and values already written.
    k_scale, v_scale: float32 [kv_heads], what the numbers of fp8 caches are multiplied with. Returns [T, heads, head_dim], contiguous.
    """
    if isinstance(plan, DefinedPlan):
        return paged_attention(
            q, k_cache, v_cache, plan.tables, plan.query_start, plan.kv_lengths, scale,
            window=plan.window, soft_cap=soft_cap, causal=plan.causal, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    if len(plan.ragged) == 1 and not plan.dense:
        out, lse = _ragged(q, k_cache, v_cache, plan.ragged[0], scale, soft_cap, with_lse=bool(plan.shared))
    else:
        out, lse = _all_groups(q, k_cache, v_cache, plan, scale, soft_cap)
    for shared in plan.shared:
        _merge_shared(out, lse, q, k_cache, v_cache, shared, scale, soft_cap)
    return out


def _all_groups(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float, soft_cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for ragged in plan.ragged:
        rows = q.index_select(0, ragged.rows)
        part, part_lse = _ragged(rows, k_cache, v_cache, ragged, scale, soft_cap, with_lse=bool(plan.shared))
        out.index_copy_(0, ragged.rows, part)
        if plan.shared:
            lse.index_copy_(0, ragged.rows, part_lse)
    for dense in plan.dense:
        part, part_lse = _dense(q, k_cache, v_cache, dense, scale, soft_cap)
        out.index_copy_(0, dense.targets, part.index_select(0, dense.real))
        if plan.shared:
            lse.index_copy_(0, dense.targets, part_lse.index_select(0, dense.real))
    return out, lse


def _ragged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    group: RaggedGroup,
    scale: float,
    soft_cap: float | None,
    *,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [R, heads, head_dim], the group's rows in order. Returns the same shape, and log-sum-exp [R, heads] (empty if not asked for)."""
    num_rows, heads, head_dim = q.shape
    lines, keys = q.reshape(-1, head_dim), k_cache.view(-1, head_dim)
    group.pattern.values().zero_()  # beta = 0 still multiplies, and what an earlier layer left there may be infinite
    torch.sparse.sampled_addmm(group.pattern, lines, keys.t(), beta=0.0, alpha=scale, out=group.pattern)
    padded = q.new_full((num_rows * heads, group.width), float("-inf"))
    padded.view(-1).index_copy_(0, group.cells, _capped(group.pattern.values(), soft_cap))
    weights = torch.softmax(padded, dim=-1)
    entries = weights.view(-1).index_select(0, group.cells)
    out = functional.embedding_bag(group.columns, v_cache.view(-1, head_dim), group.offsets, mode="sum", per_sample_weights=entries)
    # log-sum-exp from the largest score and its weight: two cheap maxima instead of a second exponential of everything.
    lse = (padded.amax(-1) - weights.amax(-1).log()).view(num_rows, heads) if with_lse else q.new_empty(0)
    return out.view(num_rows, heads, head_dim), lse


def _dense(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: DenseGroup, scale: float, soft_cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns [S * Q, heads, head_dim] and log-sum-exp [S * Q, heads], padding rows included."""
    rows = q.index_select(0, group.rows)
    k, v = (_gather(cache, group.blocks, group.num_sequences) for cache in (k_cache, v_cache))
    return _grouped_heads(rows, k, v, group.mask, scale, soft_cap)


def _merge_shared(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    group: SharedGroup,
    scale: float,
    soft_cap: float | None,
) -> None:
    """Adds what the group's rows see in their shared blocks to `out` and `lse`, in place."""
    k, v = (_gather(cache, group.blocks, 1) for cache in (k_cache, v_cache))
    part, part_lse = _grouped_heads(q.index_select(0, group.rows), k, v, None, scale, soft_cap)
    own_lse = lse.index_select(0, group.rows)
    share = torch.sigmoid(part_lse - own_lse).unsqueeze(-1).to(out.dtype)
    out.index_copy_(0, group.rows, torch.lerp(out.index_select(0, group.rows), part, share))
    lse.index_copy_(0, group.rows, torch.logaddexp(own_lse, part_lse))


def _gather(cache: torch.Tensor, blocks: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """[S, kv_heads, tokens, head_dim] of row numbers ordered by (sequence, head, block)."""
    num_blocks, kv_heads, _, head_dim = cache.shape
    return cache.view(num_blocks * kv_heads, -1).index_select(0, blocks).view(num_sequences, kv_heads, -1, head_dim)


def _grouped_heads(
    rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, soft_cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The query heads of one key head become rows of one product.

    rows: [S * Q, heads, head_dim]; k, v: [S, kv_heads, L, head_dim]; mask: [S, 1, heads / kv_heads * Q, L].
    Returns [S * Q, heads, head_dim] and log-sum-exp float32 [S * Q, heads].
    """
    num_sequences, kv_heads, _, head_dim = k.shape
    heads = rows.shape[1]
    split = (num_sequences, -1, kv_heads, heads // kv_heads, head_dim)
    lines = rows.view(split).permute(0, 2, 3, 1, 4).reshape(num_sequences, kv_heads, -1, head_dim)
    out, lse = _attend(lines, k, v, mask, scale, soft_cap)
    joined = (num_sequences, kv_heads, heads // kv_heads, -1)
    out = out.reshape(*joined, head_dim).permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim)
    return out, lse.reshape(joined).permute(0, 3, 1, 2).reshape(-1, heads)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, soft_cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One masked attention [S, heads, rows, head_dim] with its log-sum-exp [S, heads, rows], by flash attention where torch has it."""
    if soft_cap is None and q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    scores = _capped(torch.matmul(q, k.transpose(2, 3)).float() * scale, soft_cap)
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype), v), lse


def _capped(scores: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    return scores if soft_cap is None else torch.tanh(scores / soft_cap) * soft_cap
