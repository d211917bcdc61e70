"""The drafters of a replay, on a clock that only they move: each pass takes what passes of its drafter took in the trace."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.drafters.builtin import TEXT_DRAFTERS
from engine.lab.line import fit_line
from engine.lab.stand_in import Manner, StandIn
from engine.speculation.experience import Experience

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from engine.drafters.base import DraftBatch, Drafter, Drafts, Progress
    from engine.lab.trace import StepRecord, Trace
    from engine.sequence import Sequence as EngineSequence


class Clock:
    """Virtual nanoseconds; stands still until it is moved."""

    def __init__(self) -> None:
        self._now = 0

    def __call__(self) -> int:
        return self._now

    def move(self, seconds: float) -> None:
        self._now += round(seconds * 1e9)


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds of a pass: some of its own, and as many again for each request."""

    fixed: float
    each: float

    @staticmethod
    def of_steps(steps: Sequence[StepRecord], name: str) -> Price | None:
        """What passes of `name` took in a trace; None where it did not draft. What was drafted inside steps is in their time."""
        passes = [(requests, seconds) for step in steps for drafter, requests, seconds in step.passes if drafter == name]
        if passes:
            return Price(*fit_line(*map(np.array, zip(*passes, strict=True))))
        return Price(0.0, 0.0) if any(drafter == name for step in steps for drafter, _ in step.groups) else None


class Timed:
    """`drafter`, whose passes move the clock by their price; without one, by what they take here and now."""

    def __init__(self, drafter: Drafter, clock: Clock, price: Price | None) -> None:
        self.name, self.taps, self.prior = drafter.name, drafter.taps, drafter.prior
        self._drafter = drafter
        self._clock = clock
        self._price = price

    def propose(self, batch: DraftBatch) -> Drafts:
        began = time.perf_counter()
        drafts = self._drafter.propose(batch)
        price = self._price
        self._clock.move(time.perf_counter() - began if price is None else price.fixed + price.each * len(batch.sequences))
        return drafts

    def observe(self, progress: Progress) -> None:
        self._drafter.observe(progress)

    def finish(self, sequence: EngineSequence, *, complete: bool) -> None:
        self._drafter.finish(sequence, complete=complete)


class Told:
    """What the trace's engine knew of its drafters when it started; what a replay learns is for the replay alone."""

    def __init__(self, experience: Mapping[str, str]) -> None:
        """By name, as `Experience.to_json` writes it. Raises ValueError for anything else."""
        self._known = {name: Experience.from_json(text) for name, text in experience.items()}

    def recall(self, name: str) -> Experience | None:
        """See `Records`."""
        return self._known.get(name)

    def keep(self, name: str, experience: Experience) -> None:
        """See `Records`."""


class ReplaySupply:
    """The lookups themselves, and a stand-in for every other name. `members`: the portfolio's, the text lookup first."""

    def __init__(
        self,
        members: tuple[str, ...],
        answers: Mapping[str, NDArray[np.int64]],
        most: int,
        clock: Clock,
        manners: Mapping[str, Manner],
        prices: Mapping[str, Price],
    ) -> None:
        """answers: by request. most: drafts of a block at most. manners, prices: by drafter, where anything is known."""
        self.members = members
        self._answers = answers
        self._most = most
        self._clock = clock
        self._manners = manners
        self._prices = prices

    @staticmethod
    def of(trace: Trace, told: Told, clock: Clock) -> ReplaySupply:
        """Drafters as they were in the trace; one that did not draft there, as it was `told` of."""
        answers = {str(request.number): np.array(end.output, np.int64) for request, end in trace.answered()}
        manners, prices = {}, {}
        for name in {*trace.engine.members, trace.engine.drafter}:
            known = told.recall(name)
            if (manner := Manner.of_steps(trace.steps, name)) is not None:
                manners[name] = manner
            elif known is not None and known.brought.weight:
                manners[name] = Manner.of_mean(float(known.brought.total[0]) / known.brought.weight)
            if (price := Price.of_steps(trace.steps, name)) is not None:
                prices[name] = price
            elif known is not None and known.drafting.known:
                prices[name] = Price(known.drafting.fixed, known.drafting.each)
        return ReplaySupply(trace.engine.members, answers, trace.engine.max_draft_tokens, clock, manners, prices)

    def tags(self, name: str) -> tuple[str, ...]:  # noqa: ARG002 - a trace has no tags
        return ()

    def create(self, name: str) -> Drafter:
        return Timed(self._drafter(name), self._clock, self._prices.get(name))

    def retire(self, name: str) -> None:
        """A stand-in holds no KV."""
        self.members = tuple(member for member in self.members if member != name)

    def _drafter(self, name: str) -> Drafter:
        if name in TEXT_DRAFTERS:
            return TEXT_DRAFTERS[name]()
        return StandIn(name, self._answers, self._manners.get(name) or Manner.of_mean(None), self._most)
