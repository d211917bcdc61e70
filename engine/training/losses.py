"""DSpark's training loss (arXiv 2607.05147, section 3.4): 0.1 cross entropy + 0.9 total variation + 1.0 confidence, early slots first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

CE, TV, CONFIDENCE = 0.1, 0.9, 1.0


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars on the device; `total` has the gradient. acceptance: mean chance that a slot's draft would be accepted, slot by slot [G].

    length: expected tokens a block brings, the bonus token included, were every block as deep as its text allows.
    """

    total: torch.Tensor
    ce: torch.Tensor
    tv: torch.Tensor
    confidence: torch.Tensor
    acceptance: torch.Tensor
    length: torch.Tensor

    @staticmethod
    def mean(several: Sequence[Losses]) -> Losses:
        """Of several texts, without gradient."""
        columns = zip(*((one.total.detach(), one.ce, one.tv, one.confidence, one.acceptance, one.length) for one in several), strict=True)
        return Losses(*(torch.stack(column).mean(0) for column in columns))


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
    ce, tv = (rows.view_as(weight) for rows in Divergences.apply(logits.flatten(0, 1), target_logits.flatten(0, 1), targets.flatten()))
    ce_loss, tv_loss = (ce * weight).sum() / total_weight, (tv * weight).sum() / total_weight
    total = CE * ce_loss + TV * tv_loss
    accepted = (1.0 - tv.detach()).clamp(0.0, 1.0)
    confidence_loss = torch.zeros((), device=valid.device)
    if confidence is not None:
        bce = functional.binary_cross_entropy_with_logits(confidence.float(), accepted, reduction="none")
        confidence_loss = (bce * weight).sum() / total_weight
        total = total + CONFIDENCE * confidence_loss
    counted = valid.float().sum(0).clamp_min(1.0)
    acceptance = (accepted * valid).sum(0) / counted
    length = 1.0 + torch.cumprod(accepted * valid, 1).sum(1).mean()
    return Losses(total, ce_loss.detach(), tv_loss.detach(), confidence_loss.detach(), acceptance, length)


class Divergences(torch.autograd.Function):
    """(cross entropy, total variation), float32 [N], of draft logits [N, vocab] to target logits and to target tokens, int64 [N].

    With the draft distribution q, the target's p, the token t and s = sign(q - p), the gradients over the logits are
    q - onehot(t) and q (s - sum(q s)) / 2. Written out because the vocabulary is what a step's time goes into: autograd's own keeps and
    reads three times as much. Only the draft logits get a gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target_logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        draft = torch.softmax(logits, -1, dtype=torch.float32)
        at_target = draft.gather(1, targets[:, None]).squeeze(1)
        difference = torch.softmax(target_logits, -1, dtype=torch.float32).neg_().add_(draft)
        tv = 0.5 * torch.linalg.vector_norm(difference, 1, dim=-1)
        sign = difference.sign_().to(torch.int8)
        ctx.save_for_backward(draft, sign, targets)
        ctx.dtype = logits.dtype
        return -at_target.clamp_min(1e-30).log(), tv

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        draft, sign, targets = ctx.saved_tensors
        of_ce, of_tv = gradients[0], 0.5 * gradients[1]
        signed = sign.float()
        lean = torch.linalg.vecdot(draft, signed)
        signed.mul_(of_tv[:, None]).add_((of_ce - of_tv * lean)[:, None]).mul_(draft)
        signed.scatter_add_(1, targets[:, None], -of_ce[:, None])
        return signed.to(ctx.dtype), None, None
