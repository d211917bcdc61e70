"""The requests that are in an engine: how they come in, and how they leave with a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.flight import Live
from engine.types import FinishReason, Result, TokenLedger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.device_decoding import DeviceDecoding
    from engine.device_rules import DeviceRules
    from engine.lab.recorder import Recorder
    from engine.logit_rules import Constraint, LogitRules
    from engine.logprobs import Logprobs
    from engine.scheduler import Scheduler
    from engine.sequence import Sequence
    from engine.speculation.speculator import Speculator
    from engine.stopping import StopWatch
    from engine.types import Request


class LiveRequests:
    """By their sequences. Whoever keeps something of a request hears when it leaves; `finished`: how many have left with a result.

    device: where steps may be made without the host, if anywhere.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        speculator: Speculator,
        rules: DeviceRules | LogitRules,
        logprobs: Logprobs,
        recorder: Recorder,
        device: DeviceDecoding | None,
    ) -> None:
        self._scheduler, self._speculator, self._device = scheduler, speculator, device
        self._rules, self._logprobs, self._recorder = rules, logprobs, recorder
        self._live: dict[int, Live] = {}
        self.finished = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Live]:
        """In the order of their coming; they may leave meanwhile."""
        return iter(list(self._live.values()))

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.serial in self._live

    def __getitem__(self, sequence: Sequence) -> Live:
        return self._live[sequence.serial]

    def enter(self, sequence: Sequence, watch: StopWatch, drafter: str | None, constraint: Constraint | None) -> None:
        """A request that was queued: what finds its end, who drafts for it, and what holds its answer to a form."""
        self._recorder.pulled(sequence)
        self._rules.enter(sequence, watch.end_tokens, constraint)
        self._logprobs.enter(sequence)
        self._live[sequence.serial] = Live(sequence, watch, drafter)

    def refuse(self, request: Request, error: str) -> Result:
        """The result of a request that was never queued."""
        self.finished += 1
        ledger = TokenLedger(prompt=len(request.prompt_token_ids))
        return Result(request.id, (), "", FinishReason.ERROR, ledger, error=error, choice=request.choice)

    def close(self, live: Live, reason: FinishReason, error: str | None = None) -> list[Result]:
        """Takes a request out. Its result, or nothing as long as a step with it is in flight, whose time it will be charged."""
        sequence = live.sequence
        sequence.retract()
        answered = reason in (FinishReason.STOP, FinishReason.LENGTH)
        self._recorder.ended(sequence, reason)
        prompt_logprobs, logprobs = self._logprobs.leave(sequence)
        self._remove(live, complete=answered)
        self.finished += 1
        live.result = Result(
            id=sequence.request.id,
            token_ids=tuple(sequence.output.tolist()) if answered else (),
            text=live.watch.text(sequence) if answered else "",
            finish_reason=reason,
            ledger=sequence.ledger,
            drafter=live.drafter,
            error=error,
            choice=sequence.request.choice,
            logprobs=logprobs if answered else (),
            prompt_logprobs=prompt_logprobs if answered else (),
        )
        return [] if live.in_flight else [live.result]

    def drop(self) -> None:
        """Takes all out, without results."""
        for live in self:
            live.sequence.retract()
            self._logprobs.leave(live.sequence)
            self._remove(live, complete=False)

    def _remove(self, live: Live, *, complete: bool) -> None:
        del self._live[live.sequence.serial]
        if self._device is not None:
            self._device.retire(live.sequence)
        self._scheduler.finish(live.sequence, complete=complete)
        self._rules.leave(live.sequence)
        if live.drafter is not None:
            self._speculator.finish(live.drafter, live.sequence, complete=complete)
