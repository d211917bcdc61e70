"""DSpark's training loss (arXiv 2607.05147, section 3.4): 0.1 cross entropy + 0.9 total variation + 1.0 confidence, early slots first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

CE, TV, CONFIDENCE = 0.1, 0.9, 1.0


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars; `total` has the gradient. acceptance: mean chance that a slot's draft would be accepted, slot by slot [G]."""

    total: torch.Tensor
    ce: float
    tv: float
    confidence: float
    acceptance: torch.Tensor


def block_losses(
    logits: torch.Tensor,
    confidence: torch.Tensor | None,
    target_logits: torch.Tensor,
    targets: torch.Tensor,
    valid: torch.Tensor,
    decay: float,
) -> Losses:
    """logits, target_logits: [A, G, vocab]; targets: int64 [A, G], what the target said; valid: bool [A, G]; confidence: [A, G] logits.

    Slot k (from 0) weighs exp(-k / decay). The confidence learns c* = 1 - TV(draft, target) (eq. 8), without moving the draft.
    """
    weight = valid.float() * torch.exp(-torch.arange(valid.shape[1], device=valid.device) / decay)
    total_weight = weight.sum().clamp_min(1e-6)
    ce = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weight)
    tv = 0.5 * (logits.softmax(-1) - target_logits.softmax(-1)).abs().sum(-1)
    ce_loss, tv_loss = (ce * weight).sum() / total_weight, (tv * weight).sum() / total_weight
    total = CE * ce_loss + TV * tv_loss
    confidence_loss = torch.zeros(())
    if confidence is not None:
        bce = functional.binary_cross_entropy_with_logits(confidence, (1.0 - tv).detach().clamp(0.0, 1.0), reduction="none")
        confidence_loss = (bce * weight).sum() / total_weight
        total = total + CONFIDENCE * confidence_loss
    counted = valid.float().sum(0).clamp_min(1.0)
    acceptance = ((1.0 - tv.detach()) * valid).sum(0) / counted
    return Losses(total, float(ce_loss.detach()), float(tv_loss.detach()), float(confidence_loss.detach()), acceptance)
