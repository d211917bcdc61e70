"""The engine's loop in virtual time: the real scheduler, speculator and planner over known answers, on a machine that is a formula.

No model, no torch. A draft is accepted where it is the token that the answer goes on with, which is exact for greedy and seeded requests.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from engine.drafters.builtin import AUTO, OFF, TEXT
from engine.kv_blocks import BlockPool
from engine.scheduler import Scheduler
from engine.speculation.cost_model import Load
from engine.speculation.proposal import Proposal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from engine.scheduler import Chunk, StepPlan
    from engine.sequence import Sequence
    from engine.speculation.speculator import Speculator
    from engine.types import Request

    Ints = NDArray[np.int64]

_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Script:
    """A request, its whole answer (at least a token), and the virtual second from which on it can be had."""

    request: Request
    output: tuple[int, ...]
    arrival: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The engine's limits; see `EngineConfig`."""

    max_sequences: int
    max_step_tokens: int
    num_blocks: int
    block_size: int = 16
    max_positions: int = 1 << 30
    look_ahead: int = 64
    share_prefixes: bool = True
    fixed_drafts: int = 0


class Machine(Protocol):
    """What time it takes, in seconds. Drafters tell themselves what theirs is."""

    def step(self, load: Load) -> float:
        """A forward with verification."""
        ...

    def overhead(self, chunks: int) -> float:
        """What the host does between two steps of so many chunks."""
        ...


@dataclass(frozen=True, slots=True)
class Happened:
    """One step: when it began, its load and plan, drafts verified and accepted, tokens gained."""

    at: float
    load: Load
    plan: StepPlan
    verified: int
    accepted: int
    gained: int


@dataclass(slots=True)
class Simulation:
    """How a virtual run went. `started` and `ended`: virtual seconds by request id (first admission, end)."""

    seconds: float = 0.0
    generated: int = 0
    steps: int = 0
    step_tokens: int = 0
    sampling_steps: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    preemptions: int = 0
    prompt: int = 0
    cached: int = 0
    started: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds if self.seconds else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per request and step in which it sampled."""
        return self.generated / self.sampling_steps if self.sampling_steps else 0.0

    def tail(self, share: float) -> float:
        """The part of the time that the last `share` of requests to end took, 0 to 1."""
        ends = sorted(self.ended.values())
        before = len(ends) - max(round(share * len(ends)), 1)
        return 1.0 - (ends[before - 1] if before else 0.0) / self.seconds


class Simulator:
    """One virtual run. `default`: the drafter that a request's `auto` means; `speculator` None: no drafts at all.

    `watch` sees every step after it was booked, and the scheduler as it stands then.
    """

    def __init__(
        self,
        limits: Limits,
        machine: Machine,
        speculator: Speculator | None = None,
        *,
        default: str = TEXT,
        watch: Callable[[Happened, Scheduler], None] | None = None,
    ) -> None:
        self._limits = limits
        self._machine = machine
        self._speculator = speculator
        self._default = default
        self._watch = watch
        pool = BlockPool(limits.num_blocks, limits.block_size, share_prefixes=limits.share_prefixes)
        self.scheduler = Scheduler(
            pool,
            max_sequences=limits.max_sequences,
            max_step_tokens=max(limits.max_step_tokens, limits.max_sequences),
            max_positions=limits.max_positions,
            fixed_drafts=limits.fixed_drafts,
        )
        self._live: dict[int, tuple[Sequence, Ints, str | None]] = {}
        self._now = 0.0
        self._result = Simulation()

    def run(self, scripts: Iterable[Script]) -> Simulation:
        """Raises UnfitRequestError for a request that could never run, RuntimeError where the scheduler finds nothing to do."""
        waiting = [(script.arrival, number, script) for number, script in enumerate(scripts)]
        heapq.heapify(waiting)
        while waiting or self._live:
            if not self._live:
                self._now = max(self._now, waiting[0][0])
            while waiting and waiting[0][0] <= self._now and len(self._live) < self._limits.max_sequences + self._limits.look_ahead:
                self._add(heapq.heappop(waiting)[2])
            self._step()
        self._result.seconds = self._now
        return self._result

    def _add(self, script: Script) -> None:
        if not script.output:
            raise ValueError(f"request {script.request.id} has no answer to replay")
        name = self._default if script.request.drafter == AUTO else script.request.drafter
        drafts = self._speculator is not None and name != OFF
        sequence = self.scheduler.add(script.request)
        self._live[sequence.serial] = (sequence, np.array(script.output, np.int64), name if drafts else None)

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        if plan.unfit or plan.num_tokens == 0:
            raise RuntimeError(f"the scheduler cannot go on: {len(plan.unfit)} requests outgrew the cache, {len(self._live)} are left")
        for sequence in plan.admitted:
            self._enter(sequence)
        proposal = self._draft(plan)
        load = self._load(plan, proposal)
        began, seconds = self._now, self._machine.step(load)
        accepted, following = self._judge(plan.decoding, proposal)
        if self._speculator is not None:
            self._speculator.learn_cost(load, seconds)
            self._speculator.settle(proposal, [chunk.sequence for chunk in plan.decoding], accepted, following)
        chunks = len(plan.decoding) + len(plan.prefill)
        self._now += seconds + int(proposal.nanoseconds.sum()) * 1e-9 + self._machine.overhead(chunks)
        gained = self._confirm(plan, accepted)
        self._count(plan, proposal, accepted, gained)
        if self._watch is not None:
            self._watch(Happened(began, load, plan, int(proposal.chosen.sum()), int(accepted.sum()), gained), self.scheduler)

    def _enter(self, sequence: Sequence) -> None:
        self._result.started.setdefault(sequence.request.id, self._now)
        name = self._live[sequence.serial][2]
        if name is not None and self._speculator is not None:
            self._speculator.start(name, sequence.slot)

    def _draft(self, plan: StepPlan) -> Proposal:
        sequences = [chunk.sequence for chunk in plan.decoding]
        if self._speculator is None:
            return Proposal.empty(len(sequences))
        names = [self._live[sequence.serial][2] for sequence in sequences]
        budget = self.scheduler.max_step_tokens - plan.num_tokens
        proposal = self._speculator.propose(
            sequences,
            names,
            step=self._result.steps,
            prefill=plan.prefill_tokens,
            budget=budget,
            remaining=self.scheduler.remaining(sequences),
        )
        for row in np.flatnonzero(proposal.chosen):
            proposal.chosen[row] = self.scheduler.grant_drafts(sequences[row], int(proposal.chosen[row]))
        return proposal

    @staticmethod
    def _load(plan: StepPlan, proposal: Proposal) -> Load:
        chunks, drafts = plan.decoding + plan.prefill, int(proposal.chosen.sum())
        rows = sum(chunk.samples for chunk in chunks) + drafts
        fed = np.array([chunk.count for chunk in chunks], np.int64)
        fed[: len(plan.decoding)] += proposal.chosen
        starts = np.array([chunk.start for chunk in chunks], np.int64)
        pairs = int((fed * starts + fed * (fed + 1) // 2).sum())
        return Load(plan.num_tokens + drafts, rows, sum(chunk.start + chunk.count for chunk in chunks) + drafts, pairs)

    def _judge(self, decoding: list[Chunk], proposal: Proposal) -> tuple[Ints, Ints]:
        """(accepted drafts, the token after them or -1 past the end) of each decoding sequence."""
        accepted, following = np.zeros(len(decoding), np.int64), np.full(len(decoding), -1, np.int64)
        for row, chunk in enumerate(decoding):
            truth, drafts = self._rest(chunk.sequence), proposal.tokens(row)
            width = min(len(truth), len(drafts))
            wrong = np.flatnonzero(truth[:width] != drafts[:width])
            accepted[row] = wrong[0] if len(wrong) else width
            if accepted[row] < len(truth):
                following[row] = truth[accepted[row]]
        return accepted, following

    def _confirm(self, plan: StepPlan, accepted: Ints) -> int:
        gained = 0
        for row, chunk in enumerate(plan.decoding + plan.prefill):
            if not chunk.samples:
                self.scheduler.complete(chunk, _NOTHING, chunk.count)
                continue
            stood = int(accepted[row]) if row < len(accepted) else 0
            tokens = self._rest(chunk.sequence)[: stood + 1]
            self.scheduler.complete(chunk, tokens, chunk.count + min(stood, len(tokens)))
            gained += len(tokens)
            self._result.sampling_steps += 1
            if not len(self._rest(chunk.sequence)):
                self._end(chunk.sequence)
        return gained

    def _end(self, sequence: Sequence) -> None:
        _, _, name = self._live.pop(sequence.serial)
        self._result.ended[sequence.request.id] = self._now
        self._result.prompt += sequence.ledger.prompt
        self._result.cached += sequence.ledger.cached
        self.scheduler.finish(sequence, complete=True)
        if name is not None and self._speculator is not None:
            self._speculator.finish(name, sequence, complete=True)

    def _rest(self, sequence: Sequence) -> Ints:
        """What the answer goes on with."""
        return self._live[sequence.serial][1][sequence.num_generated :]

    def _count(self, plan: StepPlan, proposal: Proposal, accepted: Ints, gained: int) -> None:
        result = self._result
        result.steps += 1
        result.step_tokens += plan.num_tokens + int(proposal.chosen.sum())
        result.generated += gained
        result.drafted += int(proposal.drafted.sum())
        result.verified += int(proposal.chosen.sum())
        result.accepted += int(accepted.sum())
        result.preemptions += plan.preempted
