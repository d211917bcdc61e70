"""Steps that were launched and whose results are still to come, and how long the device took for them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from engine.work import Outcome

if TYPE_CHECKING:
    from engine.logprobs import Kept
    from engine.sequence import Sequence
    from engine.speculation.judge import Pending
    from engine.stopping import StopWatch
    from engine.types import Result
    from engine.work import Work


@dataclass(slots=True)
class Live:
    """A request that is in the engine. in_flight: steps that were launched with it and not read yet.

    result: what became of it, where it ended while another step with it was in flight; it is given out once that one is accounted for.
    """

    sequence: Sequence
    watch: StopWatch
    drafter: str | None
    in_flight: int = 0
    result: Result | None = None


class Timing(Protocol):
    """One step's time."""

    def stop(self) -> None:
        """Everything of the step is launched."""
        ...

    def nanoseconds(self) -> int:
        """What the device took for it, once its result was read. Steps that overlap share no nanosecond."""
        ...


class HostClock:
    """For devices that have done what they were told when the call returns."""

    def start(self) -> Timing:
        return _HostTiming(time.perf_counter_ns())


@dataclass(slots=True)
class _HostTiming:
    started: int
    stopped: int = 0

    def stop(self) -> None:
        self.stopped = time.perf_counter_ns()

    def nanoseconds(self) -> int:
        return self.stopped - self.started


class DeviceClock:
    """For a GPU: by events in its stream. A step that was launched early begins when the one before it has ended."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._last: torch.cuda.Event | None = None

    def start(self) -> Timing:
        return _DeviceTiming(self, self._last)

    def record(self) -> torch.cuda.Event:
        """This moment in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def ended(self, event: torch.cuda.Event) -> None:
        """A step ends here. One that fails before that never began, as far as the next is concerned."""
        self._last = event


class _DeviceTiming:
    def __init__(self, clock: DeviceClock, before: torch.cuda.Event | None) -> None:
        self._clock, self._before = clock, before
        self._started = clock.record()
        self._ended = self._started

    def stop(self) -> None:
        self._ended = self._clock.record()
        self._clock.ended(self._ended)

    def nanoseconds(self) -> int:
        self._ended.synchronize()
        milliseconds = self._started.elapsed_time(self._ended)
        if self._before is not None:
            milliseconds = min(milliseconds, self._before.elapsed_time(self._ended))
        return max(round(milliseconds * 1e6), 1)


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that was read: what ran and what came of it, None where nobody had a token; whose its chunks are; and who had none any more,
    though the step was launched with them. nanoseconds: of the device.
    """

    ran: tuple[Work, Outcome] | None
    lives: list[Live]
    resting: list[Live]
    nanoseconds: int


@dataclass(frozen=True, slots=True)
class Flight:
    """`lives`: whose chunks the step has. taps: what is left for drafters to see once it is known which drafts stood.

    promised: the scheduler went on as if it were known; so the next step can be launched before this one is read.
    """

    work: Work
    lives: list[Live]
    pending: Pending
    timing: Timing
    taps: dict[int, torch.Tensor]
    kept: Kept | None
    promised: bool
    on_device = False

    def land(self) -> Landed:
        """Waits for the result."""
        decision, kept = self.pending.read(), self.kept
        if kept is not None and decision.scores is not None:
            kept = replace(kept, answer=decision.scores)
        nanoseconds = self.timing.nanoseconds()
        outcome = Outcome(decision.accepted, decision.following, decision.finite, self.taps, nanoseconds, kept)
        return Landed((self.work, outcome), self.lives, [], nanoseconds)
