"""From logits to the distribution that is sampled, and one token from it; vectorised over rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.noise import exponential

_NARROW = 256
"""Candidates looked at first where top-k or top-p cut the row: sorting 256 of 49,152 logits costs a tenth of sorting all."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """probabilities: float32 [R, K], every row summing to 1. ids: int64 [R, K], the tokens of the columns; None: column = token."""

    probabilities: torch.Tensor
    ids: torch.Tensor | None = None

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [R]: the probability of `tokens` [R], 0 for those that were cut off."""
        if self.ids is None:
            return self.probabilities.gather(1, tokens[:, None])[:, 0]
        return torch.where(self.ids == tokens[:, None], self.probabilities, 0.0).sum(1)

    def weigh(self, full: torch.Tensor) -> torch.Tensor:
        """The columns of `full` [R, vocab] that belong to this distribution's own columns."""
        return full if self.ids is None else full.gather(1, self.ids)


def temper(logits: torch.Tensor, temperature: torch.Tensor) -> Distribution:
    """Softmax of `logits` [R, vocab] at `temperature` [R] > 0, nothing cut off."""
    return Distribution(torch.softmax(logits / temperature[:, None], dim=1))


def truncate(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, width: int
) -> tuple[Distribution, torch.Tensor]:
    """Temperature, then top-k, then top-p, in transformers' order, looking at the `width` largest logits of each row.

    logits: [R, vocab]; temperature float32, top_k int64 (0 = off), top_p float32 (1 = off): [R]. Logits tied with the k-th
    stay in. Top-p keeps a token while those strictly above it hold less than top_p. Also returns bool [R]: whether `width` was enough.
    """
    scaled = logits / temperature[:, None]
    values, ids = scaled.topk(width, dim=1)
    limited = top_k > 0
    last = values.gather(1, (top_k.clamp(1, width) - 1)[:, None])
    keep = ((values >= last) | ~limited[:, None]) & (values > -torch.inf)  # what a rule forbade is never among the candidates
    enough = ~limited | ~keep[:, -1]
    total = torch.where(limited, values.masked_fill(~keep, -torch.inf).logsumexp(1), scaled.logsumexp(1))
    mass = (values - total[:, None]).exp() * keep
    # What is strictly above: equal logits share the sum before the first of them, so they stay or go together.
    fresh = torch.ones_like(keep)
    fresh[:, 1:] = values[:, 1:] < values[:, :-1]
    above = torch.where(fresh, mass.cumsum(1) - mass, 0.0).cummax(1).values
    keep &= (above < top_p[:, None]) | (top_p >= 1.0)[:, None]
    mass = mass * keep
    enough = enough & ~keep[:, -1] if width < logits.shape[1] else torch.ones_like(limited)
    return Distribution(mass / mass.sum(1, keepdim=True), ids), enough


def draw(weights: torch.Tensor, ids: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    """int64 [R]: one token a row, with probability proportional to `weights` [R, K], by the noise that `keys` [R] name.

    The noise belongs to the token, not to its column, so cutting the row differently cannot change a winner that stays in.
    """
    columns = torch.arange(weights.shape[1], device=weights.device) if ids is None else ids
    winners = (exponential(keys, columns) / weights).argmin(1)
    return winners if ids is None else ids.gather(1, winners[:, None])[:, 0]


def narrow_width(vocab: int, device: torch.device) -> int:
    """How many candidates to try first. Asking a GPU whether they were enough would stall it, so there all are sorted."""
    return min(_NARROW, vocab) if device.type == "cpu" else vocab
