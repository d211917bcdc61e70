"""Rotary position embedding (arXiv 2104.09864) in the half-split layout that transformers uses."""

from __future__ import annotations

import torch


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (x[i], x[i + R / 2]) of each head; dimensions from R on pass through. Returns a new tensor.

    x: [T, heads, head_dim], any strides. cos, sin: [T, R] with R <= head_dim, both halves filled; the first half of `sin` is
    negated, so that a rotation is x * cos + roll(x) * sin: half the passes over memory of the textbook form.
    """
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if rotated == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(rotated // 2, -1), sin)
    head = x[..., :rotated]
    return torch.cat((torch.addcmul(head * cos, head.roll(rotated // 2, -1), sin), x[..., rotated:]), dim=-1)
