"""How many drafted tokens of each request to verify in a step, so that accepted tokens per second are highest. No torch, no clock.

Two exact ways to choose where drafts are random (DSpark's algorithm 1 and its fixed-capacity form): the choice may not depend on a
token it has not admitted. `survival[s, j]`, the chance that drafts 0..j of request s all stand, must therefore not have been
computed from draft j or any later one. `search` looks at everything, and may be used only where drafts are deterministic given the text so
far (greedy, seeded, or point-mass drafters), for then they carry no randomness that a choice could favour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from engine.speculation.cost_model import Load

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.speculation.cost_model import CostModel

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_MARGIN = 1.02
"""Predicted gain below which nothing is drafted: the cost model's own error is of that size."""
_DEPTH = 16
"""Drafts of a request, where there are many requests."""
_DRAFTS = 64
"""Drafts of a step that few requests share. A row costs the fewer the less there are, so long drafts pay once the batch is nearly empty."""
_DOUBT = 1.1
"""What drafts add to a step is taken as so much more: of many estimates of survival those that are too high get chosen."""
_CLEAR = 1.0
"""How clear it is who will end last: a request with twice as many steps left ends last 2 to this power times as often. Taken for clearer,
jobs of equal requests lose: who is thought to end soon is left to fall behind."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What could be verified. survival: float64 [S, D], falling along a row, 0 past a request's last draft."""

    survival: Floats

    def order(self) -> tuple[Ints, Floats]:
        """All candidates, best first: flat indices into `survival`, and their survival. Earlier drafts of a request come first."""
        flat = self.survival.ravel()
        index = np.flatnonzero(flat > 0.0)
        # Stable, so equal survivals keep the order of positions, and what is taken of a request is always a prefix.
        index = index[np.argsort(-flat[index], kind="stable")]
        return index, flat[index]

    def lengths(self, index: Ints) -> Ints:
        """int64 [S]: drafts per request when the candidates in `index` are taken."""
        return np.bincount(index // max(self.survival.shape[1], 1), minlength=len(self.survival))


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step by number of drafts taken.

    `decoding` is the time of the step's decode rows alone: prefill that rides along pays for itself, and only the extra time of each
    draft, at the step's true size, is the drafts' doing.
    """

    decoding: float
    extra: Floats
    """float64 [N + 1]: seconds that 0..N drafts add; N bounds how many can be taken."""
    fixed: float = 0.0
    """The share of `decoding` that a step takes as long as anybody decodes, 0 to 1; the rest shrinks as requests end."""

    @staticmethod
    def of(cost: CostModel, *, decoding: int, prefill: int, kv_tokens: int, drafts: int) -> StepCost:
        """Costs of a step of `decoding` rows over `kv_tokens` of context, `prefill` tokens beside them, and up to `drafts` drafts."""
        count = np.arange(drafts + 1)
        curve = cost.curve(decoding + prefill + count)
        each = cost.seconds_per_row + cost.seconds_per_pair * kv_tokens / max(decoding, 1)
        whole = cost.predict(Load(decoding, decoding, kv_tokens, kv_tokens))
        half, context = decoding // 2, kv_tokens * (decoding // 2) // max(decoding, 1)
        each_row = (whole - cost.predict(Load(half, half, context, context)) if half else 0.0) / max(decoding - half, 1)
        fixed = min(max(1.0 - decoding * each_row / max(whole, 1e-12), 0.0), 1.0)
        return StepCost(whole, _DOUBT * (curve - curve[0] + count * each), fixed)

    def per_draft(self, drafts: int) -> float:
        """Seconds that each of the first so many drafts adds on average (of fewer, where fewer can be taken)."""
        count = max(min(drafts, len(self.extra) - 1), 1)
        return float(self.extra[min(count, len(self.extra) - 1)]) / count


def token_weights(steps_left: Floats | None, requests: int, cost: StepCost) -> Floats:
    """float64 [S], 1 on average: what a token of each request saves, in shares of a step.

    While others wait for a place (steps_left None) every token is worth the same. Once nobody does, one that only lets its request end
    sooner saves that request's own part of a later step; the part that every step takes is saved by those who end last. Who that will be is
    not known: with steps_left (float64 [S]) off by Gumbel noise in their logarithm, request i is the last with a chance in proportion
    to `steps_left[i] ** _CLEAR` (Gumbel-max, as in Plackett and Luce's model of orders).
    """
    if steps_left is None:
        return np.ones(requests)
    odds = np.power(steps_left / steps_left.max(), _CLEAR)
    return np.asarray(1.0 - cost.fixed + cost.fixed * requests * odds / odds.sum())


def throughput(survival: Floats, requests: int, cost: StepCost) -> Floats:
    """float64 [N + 1]: expected tokens a second with the first 0..N of `survival` taken; each request yields one token anyway.

    N is at most the number of drafts that `cost` covers. Survivals that are weighted by `token_weights` give what is done a second.
    """
    gained = np.concatenate(([0.0], np.cumsum(survival[: len(cost.extra) - 1])))
    seconds = np.maximum(cost.decoding + cost.extra[: len(gained)], 1e-12)
    return np.asarray((requests + gained) / seconds)


def worth_drafting(weights: Floats, cost: StepCost) -> bool:
    """Whether drafts that are certain to stand would pay at all. weights: float64 [S], see `token_weights`."""
    requests, drafts = len(weights), len(cost.extra) - 1
    rates = throughput(np.repeat(-np.sort(-weights), -(-drafts // requests))[:drafts], requests, cost)
    return bool(rates.max() >= _MARGIN * rates[0])


def search(offer: Offer, cost: StepCost) -> Ints:
    """The best prefix of all candidates. Only for deterministic drafts."""
    index, survival = offer.order()
    rates = throughput(survival, len(offer.survival), cost)
    best = int(rates.argmax())
    return offer.lengths(index[: best if rates[best] >= _MARGIN * rates[0] else 0])


def early_stop(offer: Offer, cost: StepCost) -> Ints:
    """DSpark's algorithm 1: admit the next best candidate while throughput grows; the first that does not pay ends it.

    Each admission looks only at survivals of candidates already admitted and of the next one, so it is exact for random drafts
    as well. On a staircase it stops at the first riser; `top` does not.
    """
    index, survival = offer.order()
    rates = throughput(survival, len(offer.survival), cost)
    falls = np.flatnonzero(np.diff(rates) <= 0.0)
    return offer.lengths(index[: int(falls[0]) if len(falls) else len(rates) - 1])


def top(offer: Offer, capacity: int) -> Ints:
    """The `capacity` most likely candidates, for a capacity fixed before any of this step's drafts were drawn."""
    index, _ = offer.order()
    return offer.lengths(index[:capacity])


class DraftPolicy(Protocol):
    """Decides how far to draft and to verify. `Planner` is the product's; the other serves comparisons."""

    def limits(self, weights: Floats, cost: StepCost, most: int) -> Ints:
        """int64 [S]: drafts to ask for each request, `most` at most; 0 where none would be verified, however good.

        Nothing of this step may have been drawn yet. weights: see `token_weights`.
        """
        ...

    def choose(self, survival: Floats, cost: StepCost, *, random: bool) -> Ints:
        """int64 [S]: how many drafts of each request to verify, together at most as many as `cost` covers.

        survival: float64 [S, D], weighted by what a token of each request is worth.
        """
        ...


class FixedLength:
    """Verifies `length` drafts of every request, whatever they cost: the other engines' way, to measure against."""

    def __init__(self, length: int) -> None:
        self._length = length

    def limits(self, weights: Floats, cost: StepCost, most: int) -> Ints:
        del cost
        return np.full(len(weights), min(self._length, most))

    def choose(self, survival: Floats, cost: StepCost, *, random: bool) -> Ints:
        del random  # the choice looks at no draft
        lengths = np.minimum((survival > 0.0).sum(axis=1), self._length)
        return np.diff(np.minimum(np.cumsum(lengths), len(cost.extra) - 1), prepend=0)


class Planner:
    """Chooses per step, and remembers what fixed-capacity steps need: the best capacity of the steps before.

    Deterministic drafts are searched. Where a draft is random, the capacity is the one that was best two steps ago, so that
    the number of drafts is independent of what was drawn for this step (and of its immediate predecessor, which is still on the
    device while this step is planned).
    """

    def __init__(self) -> None:
        self._capacities = (0, 0)

    def limits(self, weights: Floats, cost: StepCost, most: int) -> Ints:
        """Where drafts that are certain to stand would pay; more the fewer requests there are (or matter)."""
        requests, drafts = len(weights), len(cost.extra) - 1
        if not drafts or not worth_drafting(weights, cost):
            return np.zeros(requests, np.int64)
        cheapest = float((cost.extra[1:] / np.arange(1, drafts + 1)).min()) * requests / max(cost.decoding, 1e-12)
        deepest = min(most, max(_DEPTH, int(_DRAFTS * weights.max() / requests)))
        return np.where(weights > cheapest, deepest, 0)

    def choose(self, survival: Floats, cost: StepCost, *, random: bool) -> Ints:
        offer = Offer(survival)
        best = search(offer, cost)
        fixed, latest = self._capacities
        self._capacities = (latest, int(best.sum()))
        return top(offer, min(fixed, len(cost.extra) - 1)) if random else best
