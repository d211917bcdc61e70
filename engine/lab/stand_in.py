"""In place of a drafter that needs a model: drafts that stand as often as the trace's own did, position by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.base import DraftBatch, Drafts
from engine.drafters.builtin import TEXT_DRAFTERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from engine.drafters.base import Drafter, Progress
    from engine.lab.trace import StepRecord, Trace
    from engine.sequence import Sequence


class StandIn:
    """Drafts the known answer's own tokens; the j-th of a block is falsified with the chance that a j-th draft fell in the trace.

    What is falsified depends on (request, position, depth) alone, so every policy meets the same luck.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, name: str, answers: Mapping[str, NDArray[np.int64]], rates: NDArray[np.float64]) -> None:
        self.name = name
        self.prior = rates
        self._answers = answers
        self._luck: dict[int, NDArray[np.float64]] = {}

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
            luck = np.random.default_rng(int(sequence.request.id)).random((len(answer), len(self.prior)))
            self._luck[sequence.serial] = luck
        tokens = answer[start : start + min(limit, len(self.prior))]
        stands = luck[min(start, len(answer) - 1), : len(tokens)] < self.prior[: len(tokens)]
        return np.where(stands, tokens, -1).tolist(), list(range(len(tokens)))


def acceptance_by_depth(steps: Iterable[StepRecord], most: int) -> NDArray[np.float64]:
    """float64 [most]: how often a block's j-th draft stood, if those before it did; the rate before it where none was seen."""
    stood, seen = np.zeros(most), np.zeros(most)
    for step in steps:
        for accepted, chosen in zip(step.accepted, step.chosen, strict=True):
            stood[:accepted] += 1
            seen[: min(accepted + 1, chosen)] += 1
    rates = np.zeros(most)
    last = 0.5
    for depth in range(most):
        last = rates[depth] = stood[depth] / seen[depth] if seen[depth] else last
    return rates


class ReplaySupply:
    """The lookups themselves, and a stand-in for every other name. `members`: the portfolio's, the text lookup first."""

    def __init__(self, answers: Mapping[str, NDArray[np.int64]], rates: NDArray[np.float64], members: tuple[str, ...]) -> None:
        self.members = members
        self._answers = answers
        self._rates = rates

    @staticmethod
    def of(trace: Trace) -> ReplaySupply:
        answers = {str(request.number): np.array(end.output, np.int64) for request, end in trace.answered()}
        return ReplaySupply(answers, acceptance_by_depth(trace.steps, trace.engine.max_draft_tokens), trace.engine.members)

    def tags(self, name: str) -> tuple[str, ...]:  # noqa: ARG002 - a trace has no tags
        return ()

    def create(self, name: str) -> Drafter:
        return TEXT_DRAFTERS[name]() if name in TEXT_DRAFTERS else StandIn(name, self._answers, self._rates)

    def retire(self, name: str) -> None:
        """A stand-in holds no KV."""
        self.members = tuple(member for member in self.members if member != name)
