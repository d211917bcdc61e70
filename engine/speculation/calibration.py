"""How likely is a drafted token to stand, given that those before it did: learned from every outcome seen. No torch.

A drafter puts each draft token in a bin (for lookups: how long a match it continues; for neural drafters: position and
confidence). Outcomes are counted per (drafter, bin), and a request's own recent record shifts their log odds.
Only what was observed counts: after the first rejected draft nothing more is known of that chain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.parts.confidence import logit, sigmoid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

HIGHEST = 0.995
"""Of a draft's chance to stand if those before it do."""
_ALIKE = 4.0
"""How alike requests are: the log odds of their drafts differ from each other with a variance of one over this. Of 1 to 16, 2 to 4 foretell
the drafts of lookups and of SmolLM2-135M's drafter best."""


class Discount:
    """How much of what the drafts that were chosen promised came true.

    Whoever takes the most promising of many estimates takes those that are too high (Smith and Winkler, "The Optimizer's Curse",
    Management Science 52(3), 2006): even when every bin's rate is right on average, the drafts that are verified stand less often than
    their rates say. Old evidence fades, so that a drafter that lost its credit is tried again.
    """

    _STRENGTH = 64.0
    _FADE = 0.99

    def __init__(self) -> None:
        self._stood = self._promised = self._STRENGTH

    @property
    def factor(self) -> float:
        """What promised survivals are to be multiplied with, at most 1."""
        return min(self._stood / self._promised, 1.0)

    def observe(self, promised: float, stood: float) -> None:
        """The chosen drafts of one step: how many were to stand by their survival (before the discount), and how many did."""
        self._stood = self._STRENGTH + (self._stood - self._STRENGTH) * self._FADE + stood
        self._promised = self._STRENGTH + (self._promised - self._STRENGTH) * self._FADE + promised


class Calibration:
    """Conditional acceptance of one drafter, by bin, with the requests in `slots` slots told apart.

    prior: float64 [bins], the expectation before anything was seen, worth `strength` observations.
    memory: observations (per bin) after which old ones have faded to 1/e. own_memory: steps of a request, likewise.
    """

    def __init__(self, prior: Floats, slots: int, *, strength: float = 8.0, memory: float = 2000.0, own_memory: float = 24.0) -> None:
        self._stood = prior * strength
        self._seen = np.full(len(prior), strength)
        self._memory = memory
        self._own_fade = np.exp(-1.0 / own_memory)
        self._surplus = np.zeros(slots)
        """Drafts of each request that stood beyond what the rates made of them."""
        self._information = np.zeros(slots)
        """How much each request's drafts tell: the variance of that number, were the rates right."""

    def reset(self, slot: int) -> None:
        """A new request took the slot."""
        self._surplus[slot] = self._information[slot] = 0.0

    @property
    def rates(self) -> Floats:
        """float64 [bins]: the chance that a draft in each bin stands if those before it do."""
        return np.asarray(self._stood / self._seen)

    @property
    def log_odds(self) -> Floats:
        """float64 [bins]: of `rates`."""
        return logit(self.rates)

    def shifts(self, slots: NDArray[np.int64]) -> Floats:
        """float64 [S]: by how much the log odds of the requests in `slots` lie above those of the rates.

        A Newton step from 0 towards the likeliest shift, with what is known of requests in general as its prior (Rasch's model, where
        bins are items).
        """
        return np.asarray(self._surplus[slots] / (self._information[slots] + _ALIKE))

    def survival(self, slots: NDArray[np.int64], bins: NDArray[np.int64]) -> Floats:
        """float64 [S, D]: the chance that drafts 0..j of each request all stand. bins: int64 [S, D], -1 past the last draft."""
        chances = np.minimum(sigmoid(self.log_odds[bins] + self.shifts(slots)[:, None]), HIGHEST)
        return np.asarray(np.cumprod(np.where(bins < 0, 0.0, chances), axis=1), np.float64)

    def observe(self, slots: NDArray[np.int64], bins: NDArray[np.int64], stood: NDArray[np.int64], seen: NDArray[np.int64]) -> None:
        """Outcomes of one step: of each request's chain the first `seen` drafts are decided and the first `stood` of them stand.

        bins: int64 [S, D]; stood and seen: int64 [S], `seen - stood` is 0 or 1.
        """
        if not bins.size:
            return
        columns = np.arange(bins.shape[1])
        decided = columns < seen[:, None]
        standing = columns < stood[:, None]
        rates = np.where(decided, self.rates[bins], 0.0)
        self._surplus[slots] = self._surplus[slots] * self._own_fade + stood - rates.sum(axis=1)
        self._information[slots] = self._information[slots] * self._own_fade + (rates * (1.0 - rates)).sum(axis=1)
        count = np.bincount(bins[decided], minlength=len(self._seen))
        fade = np.exp(-count / self._memory)
        self._seen = self._seen * fade + count
        self._stood = self._stood * fade + np.bincount(bins[standing], minlength=len(self._seen))
