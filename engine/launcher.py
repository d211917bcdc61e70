"""What a device does in a step: the forward and the verdict on its rows, launched together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.drafters.base import Progress
from engine.flight import Flight
from engine.speculation.judge import DeviceJudge, HostJudge, judge_peaks

if TYPE_CHECKING:
    from engine.batch import ForwardOutput
    from engine.device_rules import DeviceRules
    from engine.flight import DeviceClock, HostClock
    from engine.live_requests import LiveRequests
    from engine.logit_rules import LogitRules
    from engine.logprobs import Kept, Logprobs
    from engine.row_table import RowTable
    from engine.runner import Runner
    from engine.speculation.judge import Judge, Pending
    from engine.speculation.speculator import Speculator
    from engine.speculation.verify import Rows
    from engine.work import Work


class Launcher:
    """One per engine."""

    def __init__(
        self,
        runner: Runner,
        judge: Judge,
        clock: DeviceClock | HostClock,
        table: RowTable,
        speculator: Speculator,
        rules: DeviceRules | LogitRules,
        logprobs: Logprobs,
        requests: LiveRequests,
    ) -> None:
        self._runner, self._judge, self._clock, self._table = runner, judge, clock, table
        self._speculator, self._rules, self._logprobs, self._requests = speculator, rules, logprobs, requests

    def launch(self, work: Work, attempt: int) -> Flight:
        """Where a device works by itself, nobody waits for it here. attempt: the step's number."""
        step, rows = work.step, work.rows(self._table)
        timing = self._clock.start()
        if work.copies.size:
            self._runner.copy(work.copies)
            self._speculator.copy(*work.copies)
        # Nobody needs other logits than the highest; a judge on the device is captured with all of them.
        greedy = self._runner.latest is None and not rows.modes.any() and self._rules.idle and self._logprobs.idle
        output = self._runner.run(step, self._speculator.taps, peaks=greedy)
        pending, kept = self._verdict(output, work, rows, attempt)
        timing.stop()
        promised = self._runner.latest is not None and not (work.proposal.groups or work.proposal.drafted.any())
        if promised:
            # Every row is of confirmed text, and the next step overwrites what is tapped.
            self._speculator.observe(Progress(work.chunks, step.query_start, work.counts, step.positions, step.slots, output.taps))
        lives = [self._requests[chunk.sequence] for chunk in work.chunks]
        for live in lives:
            live.in_flight += 1
        return Flight(work, lives, pending, timing, {} if promised else output.taps, kept, promised)

    def _verdict(self, output: ForwardOutput, work: Work, rows: Rows, attempt: int) -> tuple[Pending, Kept | None]:
        """On all rows of a step, and what is kept of its log-probabilities."""
        counts = work.step.row_counts
        if output.peaks is not None:
            return judge_peaks(output.peaks, rows, counts), None
        logits, kept = self._logprobs.keep(output.logits, work)
        rules = self._rules.apply(logits, work)
        wanted = None if kept is None else kept.wanted
        return self._judge(logits, rows, counts, work.slots, attempt, work.row_probabilities(logits), rules, wanted), kept


def make_judge(runner: Runner) -> Judge:
    """Where the host does not wait for steps, their verdicts stay on the device as well."""
    return HostJudge() if runner.latest is None else DeviceJudge(runner.latest)
