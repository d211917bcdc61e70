"""Attention written from its definition, one query row at a time, in float64."""

from __future__ import annotations

import numpy as np
import torch


def naive_attention(
    q: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    query_lengths: list[int],
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """q: [T, heads, head_dim]; keys, values: one [kv_length, kv_heads, head_dim] a sequence. Returns float64 [T, heads, head_dim]."""
    out = np.zeros(q.shape)
    heads = q.shape[1]
    row = 0
    for key, value, count in zip(keys, values, query_lengths, strict=True):
        length, kv_heads, _ = key.shape
        for index in range(count):
            position = length - count + index
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                shared = head // (heads // kv_heads)
                k = key[first : position + 1, shared].double().numpy()
                v = value[first : position + 1, shared].double().numpy()
                scores = k @ q[row, head].double().numpy() * scale
                if soft_cap is not None:
                    scores = np.tanh(scores / soft_cap) * soft_cap
                weights = np.exp(scores - scores.max())
                out[row, head] = weights / weights.sum() @ v
            row += 1
    return torch.from_numpy(out)
