"""DSpark's training loss (arXiv 2607.05147, section 3.4): 0.1 cross entropy + 0.9 total variation + 1.0 confidence, early slots first.

Two things are ours, for runs of hours instead of weeks. In place of the cross entropy to the target's sampled token stands the divergence
(Kullback-Leibler) from its whole distribution: the same gradient on average, with less noise. And it weighs more where drafts are seldom
accepted yet: the total variation hardly moves a draft that the target would refuse, for its gradient over a token is proportional to the
draft's own chance of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

KL, CONFIDENCE = 0.1, 1.0
"""The divergence's weight in the end; the total variation has the rest of 1."""
_TURN = 3.0
"""The divergence weighs exp(-_TURN * acceptance) until that is less than `KL`."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars on the device; `total` has the gradient. acceptance: mean chance that a slot's draft would be accepted, slot by slot [G].

    length: expected tokens a block brings, the bonus token included, were every block as deep as its text allows.
    """

    total: torch.Tensor
    kl: torch.Tensor
    tv: torch.Tensor
    confidence: torch.Tensor
    acceptance: torch.Tensor
    length: torch.Tensor

    @staticmethod
    def mean(several: Sequence[Losses]) -> Losses:
        """Of several texts, without gradient."""
        columns = zip(*((one.total.detach(), one.kl, one.tv, one.confidence, one.acceptance, one.length) for one in several), strict=True)
        return Losses(*(torch.stack(column).mean(0) for column in columns))


def block_losses(
    logits: torch.Tensor,
    confidence: torch.Tensor | None,
    target_logits: torch.Tensor,
    valid: torch.Tensor,
    decay: float,
) -> Losses:
    """logits, target_logits: [A, G, vocab]; valid: bool [A, G]; confidence: [A, G] logits.

    Slot k (from 0) weighs exp(-k / decay). The confidence learns c* = 1 - TV(draft, target) (eq. 8), without moving the draft.
    """
    weight = valid.float() * torch.exp(-torch.arange(valid.shape[1], device=valid.device) / decay)
    total_weight = weight.sum().clamp_min(1e-6)
    kl, tv = (rows.view_as(weight) for rows in Divergences.apply(logits.flatten(0, 1), target_logits.flatten(0, 1)))
    accepted = (1.0 - tv.detach()).clamp(0.0, 1.0)
    acceptance = (accepted * valid).sum(0) / valid.float().sum(0).clamp_min(1.0)
    early = torch.exp(-_TURN * acceptance).clamp_min(KL)
    total = ((early * kl + (1.0 - early) * tv) * weight).sum() / total_weight
    kl_loss, tv_loss = ((rows.detach() * weight).sum() / total_weight for rows in (kl, tv))
    confidence_loss = torch.zeros((), device=valid.device)
    if confidence is not None:
        bce = functional.binary_cross_entropy_with_logits(confidence.float(), accepted, reduction="none")
        confidence_loss = (bce * weight).sum() / total_weight
        total = total + CONFIDENCE * confidence_loss
    length = 1.0 + torch.cumprod(accepted * valid, 1).sum(1).mean()
    return Losses(total, kl_loss, tv_loss, confidence_loss.detach(), acceptance, length)


class Divergences(torch.autograd.Function):
    """(Kullback-Leibler divergence, total variation), float32 [N], of draft logits [N, vocab] from target logits.

    With the draft distribution q, the target's p and s = sign(q - p), the gradients over the logits are q - p and q (s - sum(q s)) / 2.
    Written out because the vocabulary is what a step's time goes into: autograd's own keeps and reads three times as much. Only the draft
    logits get a gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_draft, log_target = (torch.log_softmax(rows, -1, dtype=torch.float32) for rows in (logits, target_logits))
        target = log_target.exp()
        kl = torch.linalg.vecdot(target, log_target.sub_(log_draft))
        draft = log_draft.exp_()
        difference = target.neg_().add_(draft)
        ctx.save_for_backward(draft, difference)
        ctx.dtype = logits.dtype
        return kl, 0.5 * torch.linalg.vector_norm(difference, 1, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        draft, difference = ctx.saved_tensors
        of_kl, of_tv = gradients[0], 0.5 * gradients[1]
        signed = difference.sign()
        lean = torch.linalg.vecdot(draft, signed)
        signed.mul_(of_tv[:, None]).sub_((of_tv * lean)[:, None]).mul_(draft).addcmul_(difference, of_kl[:, None])
        return signed.to(ctx.dtype), None
