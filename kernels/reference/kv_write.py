"""Writes a step's keys and values into the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from kernels.native.attention_plan import NativePlan
    from kernels.reference.attention_plan import AttentionPlan


def kv_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan | NativePlan) -> None:
    """k, v: [T, kv_heads, head_dim]; caches: [num_blocks, kv_heads, block_size, head_dim] of any strides, changed in place."""
    blocks, offsets = plan.slots // k_cache.shape[2], plan.slots % k_cache.shape[2]
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v
