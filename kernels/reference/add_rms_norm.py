"""A residual addition and the norm after it, as one op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.reference.rms_norm import rms_norm

if TYPE_CHECKING:
    import torch


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(`rms_norm` of x + residual, x + residual), both in x's dtype. x, residual: [..., N]; weight: [N]."""
    total = x + residual
    return rms_norm(total, weight, eps), total
