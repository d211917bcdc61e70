"""Writes a step's keys and values into the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from kernels.reference.attention_plan import AttentionPlan


def kv_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan) -> None:
    """k, v: [T, kv_heads, head_dim]; caches: [num_blocks, kv_heads, block_size, head_dim], changed in place at `plan.write_rows`."""
    head_dim = k.shape[-1]
    k_cache.view(-1, head_dim).index_copy_(0, plan.write_rows, k.reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, plan.write_rows, v.reshape(-1, head_dim))
