"""What a step that was read means: confirmed tokens, ledgers, who has ended and why, counters, and what everyone learns from it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from engine.accounting import charge, estimate, share_out
from engine.drafters.base import Progress
from engine.flight import Flight
from engine.types import FinishReason

if TYPE_CHECKING:
    from engine.device_decoding import DeviceFlight
    from engine.device_rules import DeviceRules
    from engine.flight import Landed, Live
    from engine.lab.recorder import Recorder
    from engine.live_requests import LiveRequests
    from engine.logit_rules import LogitRules
    from engine.logprobs import Logprobs
    from engine.scheduler import Chunk, Scheduler
    from engine.sequence import Sequence
    from engine.speculation.speculator import Speculator
    from engine.speculation.ways import Ways
    from engine.stats import Meter
    from engine.types import Result
    from engine.work import Outcome, Work

_NOTHING = np.empty(0, np.int64)
_TOO_SLOW = "following the answer's form takes too long: ask for a simpler pattern or schema"


class Booking:
    """One per engine. `preemptions`: how many there were so far. ways: learns how fast either way of decoding is, where there are two."""

    def __init__(
        self,
        requests: LiveRequests,
        scheduler: Scheduler,
        speculator: Speculator,
        rules: DeviceRules | LogitRules,
        logprobs: Logprobs,
        recorder: Recorder,
        meter: Meter,
        ways: Ways | None,
    ) -> None:
        self._requests, self._scheduler, self._speculator = requests, scheduler, speculator
        self._rules, self._logprobs, self._recorder = rules, logprobs, recorder
        self._meter, self._ways = meter, ways
        self.preemptions = 0
        self._booked: tuple[bool, float] | None = None
        """Where the last step was made, and when it was read."""

    def begin(self) -> None:
        """A run begins: the time since the last step is nobody's."""
        self._booked = None

    def book(self, flight: Flight | DeviceFlight) -> list[Result]:
        """Waits for a step; confirms tokens, ends what has ended, and tells everyone who learns from it. Results to give out."""
        landed = flight.land()
        results = []
        for live in (*landed.lives, *landed.resting):
            live.in_flight -= 1
        if landed.ran is None:
            self._pay_for_nothing(landed)
        else:
            results += self._book_tokens(flight, landed, *landed.ran)
        return results + [live.result for live in landed.resting if live.result is not None and not live.in_flight]

    def _book_tokens(self, flight: Flight | DeviceFlight, landed: Landed, work: Work, outcome: Outcome) -> list[Result]:
        step, chunks, accepted = work.step, work.chunks, outcome.accepted
        promised = isinstance(flight, Flight) and flight.promised
        estimate(work, outcome, self._speculator.cost)  # before the model has seen this step
        self._recorder.ran(work, outcome, self._speculator.cost)
        decoding = [chunk.sequence for chunk in chunks[: work.num_decoding]]
        if not flight.on_device:  # there drafting is a part of the step
            self._speculator.learn_cost(work.load, outcome.nanoseconds * 1e-9)
        self._speculator.settle(work.proposal, decoding, accepted[: work.num_decoding], outcome.following[: work.num_decoding])
        if not promised and not flight.on_device:
            self._speculator.observe(Progress(chunks, step.query_start, work.counts + accepted, step.positions, step.slots, outcome.taps))
        charge(work, outcome)
        self._logprobs.book(work, outcome)
        results = []
        generated = 0
        for index, (chunk, live) in enumerate(zip(chunks, landed.lives, strict=True)):
            ended, kept = self._confirm(work, outcome, index, chunk, live, promised=promised)
            generated += kept
            results += ended
        self._measure(work, outcome, generated)
        self._pace(work, generated, on_device=flight.on_device)
        return results

    def _pay_for_nothing(self, landed: Landed) -> None:
        """A step was launched that nobody needed any more: its time is theirs with whom it was launched."""
        shares = share_out(landed.nanoseconds, np.ones(len(landed.resting), np.int64)).tolist()
        for live, share in zip(landed.resting, shares, strict=True):
            live.sequence.ledger.decode_ns += share
        self._count(steps=1, busy_ns=landed.nanoseconds)

    def _confirm(self, work: Work, outcome: Outcome, index: int, chunk: Chunk, live: Live, *, promised: bool) -> tuple[list[Result], int]:
        """Adds what one chunk brought to its sequence. Returns its result if there is one to give out, and how many tokens it gained."""
        sequence = live.sequence
        samples, ledger = bool(work.step.row_counts[index]), sequence.ledger
        accepted = int(outcome.accepted[index])
        if live.result is not None:  # it ended before this step was read
            if samples:
                ledger.sampled += accepted + 1
                ledger.dropped += accepted + 1
                ledger.steps += 1
            return ([] if live.in_flight else [live.result]), 0
        if not samples:
            if promised:
                self._scheduler.settle(chunk, None)
            else:
                self._scheduler.complete(chunk, _NOTHING, chunk.count)
            return [], 0
        if not outcome.finite[index]:
            return self._requests.close(live, FinishReason.ERROR, _no_number(sequence)), 0
        tokens = [*work.drafts[index][:accepted].tolist(), int(outcome.following[index])]
        kept, reason = live.watch.scan(tokens, sequence.room + sequence.promised)
        ledger.sampled += len(tokens)
        ledger.generated += kept
        ledger.dropped += len(tokens) - kept
        ledger.steps += 1
        if promised:
            self._scheduler.settle(chunk, tokens[0])
        else:
            self._scheduler.complete(chunk, np.array(tokens[:kept], np.int64), chunk.count + min(accepted, kept))
        if reason is None and self._rules.too_slow(sequence):
            return self._requests.close(live, FinishReason.ERROR, _TOO_SLOW), kept
        return ([] if reason is None else self._requests.close(live, reason)), kept

    def _pace(self, work: Work, generated: int, *, on_device: bool) -> None:
        """Learns how fast decoding is, on the device and by the host's leave."""
        before, self._booked = self._booked, (on_device, time.perf_counter())
        if self._ways is not None and before is not None and before[0] == on_device and work.num_decoding == len(work.chunks):
            seconds = self._booked[1] - before[1]
            self._ways.add(on_device=on_device, requests=work.num_decoding, tokens=generated, seconds=seconds)

    def _measure(self, work: Work, outcome: Outcome, generated: int) -> None:
        proposal = work.proposal
        sampled = outcome.accepted[work.step.row_counts > 0]
        self.preemptions += work.preempted
        self._count(
            steps=1,
            step_tokens=work.step.num_tokens,
            sampled=int(sampled.sum()) + len(sampled),
            sampling_steps=len(sampled),
            generated=generated,
            drafted=int(proposal.drafted.sum()),
            verified=int(proposal.chosen.sum()),
            accepted=int(outcome.accepted.sum()),
            busy_ns=outcome.nanoseconds + int(proposal.nanoseconds.sum()),
        )

    def _count(self, **counts: int) -> None:
        self._meter.add(
            time.monotonic(),
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_held=self._scheduler.pool.num_held,
            finished=self._requests.finished,
            preemptions=self.preemptions,
            **counts,
        )


def _no_number(sequence: Sequence) -> str:
    if sequence.request.sampling.grammar is not None:
        return "none of the tokens that the answer's form allows next has a number, or the model's vocabulary cannot spell what must come"
    return "the model's output for this request is not a number (NaN or infinite logits)"
