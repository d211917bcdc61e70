"""Root mean square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, computed in float32, returned in x's dtype.

    x: [..., N]; weight: [N]. Families that scale by (1 + w) add the one when the weights are loaded.
    """
    if x.dtype == torch.float32 == weight.dtype:
        return torch.rms_norm(x, weight.shape, weight, eps)
    return torch.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
