"""In place of a drafter that needs a model: blocks as sure as the trace's own were, whose drafts stand as often as such drafts stood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.base import DraftBatch, Drafts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from engine.drafters.base import Progress
    from engine.lab.trace import StepRecord
    from engine.sequence import Sequence

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_SURENESS = 32
"""Bins of equal width, of the chance that a draft stands if those before it do."""
_FORETOLD = 8.0
"""Outcomes that what was foretold of a bin counts for."""
_LOST = 0.01
"""A block that has come to less is not looked at further: a trace keeps three digits of its chances."""
_UNKNOWN = 0.5
"""Chance of a draft of which nothing is known at all."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a drafter drafts. blocks: the bins of the drafts of some of its blocks, never empty; a longer block goes on as it ended.

    rates: float64 [bins], how often a draft of each bin stands if those before it do.
    """

    blocks: list[list[int]]
    rates: Floats

    @staticmethod
    def by_depth(rates: Floats) -> Manner:
        """The j-th draft of every block stands with the j-th of these chances: float64 [most]."""
        return Manner([list(range(len(rates)))], rates)

    @staticmethod
    def of_mean(drafts: float | None) -> Manner:
        """Of blocks of which so many drafts stand on average, were they endless and all drafts alike; None: that is not known."""
        return Manner.by_depth(np.array([_UNKNOWN if drafts is None else drafts / (1.0 + drafts)]))

    @staticmethod
    def of_steps(steps: Iterable[StepRecord], name: str) -> Manner | None:
        """As `name` drafted in a trace; None where it did not."""
        blocks: list[list[int]] = []
        stood, seen = _FORETOLD * (np.arange(_SURENESS) + 0.5) / _SURENESS, np.full(_SURENESS, _FORETOLD)
        for step in steps:
            for row in (row for drafter, rows in step.groups if drafter == name for row in rows):
                bins = _sureness(step.survival[row])
                decided = bins[: min(step.accepted[row] + 1, step.chosen[row])]
                np.add.at(seen, decided, 1.0)
                np.add.at(stood, bins[: step.accepted[row]], 1.0)
                if bins:
                    blocks.append(bins)
        return Manner(blocks, stood / seen) if blocks else None


class StandIn:
    """Drafts the known answer's own tokens, and falsifies each with the chance that a draft as sure as it fell.

    Which block is drawn and what of it is falsified depends on (request, position) alone, so every policy meets the same luck.
    most: drafts of a block at most.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, name: str, answers: Mapping[str, Ints], manner: Manner, most: int) -> None:
        self.name = name
        self.prior = manner.rates
        self._blocks = [np.array([*bins[:most], *bins[-1:] * (most - len(bins))], np.int64) for bins in manner.blocks]
        self._answers = answers
        self._most = most
        self._luck: dict[int, Floats] = {}

    def propose(self, batch: DraftBatch) -> Drafts:
        return Drafts.certain([self._draft(sequence, int(limit)) for sequence, limit in zip(batch.sequences, batch.limits, strict=True)])

    def observe(self, progress: Progress) -> None:
        """Reads no hidden states."""

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        del complete  # either way nothing of it is needed again
        self._luck.pop(sequence.serial, None)

    def _draft(self, sequence: Sequence, limit: int) -> tuple[list[int], list[int]]:
        start, answer = sequence.num_generated, self._answers[sequence.request.id]
        luck = self._luck.get(sequence.serial)
        if luck is None:
            luck = np.random.default_rng(int(sequence.request.id)).random((len(answer), 1 + self._most))
            self._luck[sequence.serial] = luck
        tokens = answer[start : start + min(limit, self._most)]
        drawn, *fates = luck[min(start, len(answer) - 1)]
        bins = self._blocks[int(drawn * len(self._blocks))][: len(tokens)]
        stands = np.array(fates[: len(tokens)]) < self.prior[bins]
        return np.where(stands, tokens, -1).tolist(), bins.tolist()


def _sureness(survival: tuple[float, ...]) -> list[int]:
    """Bins of a block's drafts, by the chance that each stands if those before it do."""
    found, before = [], 1.0
    for chance in survival:
        if before < _LOST:
            break
        found.append(min(int(chance / before * _SURENESS), _SURENESS - 1))
        before = chance
    return found


def acceptance_by_depth(steps: Iterable[StepRecord], most: int) -> Floats:
    """float64 [most]: how often a block's j-th draft stood, if those before it did; the rate before it where none was seen."""
    stood, seen = np.zeros(most), np.zeros(most)
    for step in steps:
        for accepted, chosen in zip(step.accepted, step.chosen, strict=True):
            stood[:accepted] += 1
            seen[: min(accepted + 1, chosen)] += 1
    rates = np.zeros(most)
    last = _UNKNOWN
    for depth in range(most):
        last = rates[depth] = stood[depth] / seen[depth] if seen[depth] else last
    return rates
