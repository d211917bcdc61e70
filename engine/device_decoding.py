"""Requests that draft, decoded in a `DecodePipeline`: who may, with which blocks, how many drafts, and what the host books of it.

While every running request decodes and drafts with one drafter of hidden states, their steps need nothing of the host: the drafter drafts,
the target verifies, and the context of what stood is taken in, all inside one captured step. Its result becomes an ordinary step's once it
is read, one step late, so ledgers, calibration and texts are kept by the same code. When a request comes, memory is short, or the host's
way is faster, the engine reads what is in flight and goes on as usual.

Exactness: a draft is a function of the text (argmax, or the token that the request's own seed picks), and how many are verified in all is
fixed from older steps. Requests that sample without a seed, have rules, a grammar, or want log-probabilities stay with the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.flight import Landed
from engine.pipeline import DecodePipeline
from engine.scheduler import Chunk, StepPlan
from engine.speculation.ways import Ways
from engine.work import Outcome, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.drafters.base import DraftsOnDevice
    from engine.drafters.parts.on_device import DeviceBlocks
    from engine.flight import DeviceClock, HostClock, Live, Timing
    from engine.graphs import GraphRunner
    from engine.row_table import RowTable
    from engine.scheduler import Scheduler
    from engine.sequence import Sequence
    from engine.speculation.speculator import Speculator
    from engine.types import Request

    Ints = NDArray[np.int64]

MAX_ROWS = 512
"""Rows of a step, drafts included. Fuller steps keep the device busy without drafts."""
_EACH = (0, 1, 3, 7, 15)
"""Drafts a slot that steps are captured for, and as many as the drafter makes: few, for a capture takes as long as many steps."""
_WIDTHS = 4
"""Block tables are as wide as this to some power, as in `engine.graphs`."""
_PAUSE = 64
_LOOK_EVERY = 32
"""Steps after which drafts are made even where none seems to pay, so that the calibration goes on learning."""


def suits(request: Request) -> bool:
    """Whether a request's tokens can be chosen without the host, and its drafts are a function of its text."""
    sampling = request.sampling
    certain = sampling.greedy or sampling.seed is not None
    return certain and sampling.grammar is None and sampling.logprobs is None and not sampling.changes_logits


@dataclass(slots=True)
class _Seats:
    """A pipeline with the sequences in its slots; those that ended are gone from `lives`. each: drafts a slot of the next step."""

    pipeline: DecodePipeline
    blocks: DeviceBlocks
    name: str
    lives: dict[int, Live]
    each: int
    sent: NDArray[np.int32]
    """Block tables [S, W] as the device has them."""

    @property
    def slots(self) -> int:
        return len(self.sent)


@dataclass(frozen=True, slots=True)
class DeviceFlight:
    """A step on the device. lives: by slot."""

    decoding: DeviceDecoding
    lives: dict[int, Live]
    timing: Timing
    on_device = True

    def land(self) -> Landed:
        """Waits for the result; steps land in the order of their launches."""
        return self.decoding.land(self)


class DeviceDecoding:
    """One per engine with a `GraphRunner`. `ways`: which way the running requests should go."""

    def __init__(self, runner: GraphRunner, scheduler: Scheduler, speculator: Speculator, table: RowTable) -> None:
        self._runner, self._scheduler, self._speculator, self._table = runner, scheduler, speculator, table
        self.ways = Ways()
        self._seats: _Seats | None = None
        self._drafter: DraftsOnDevice | None = None
        self._made: dict[tuple[int, int], tuple[DecodePipeline, DeviceBlocks]] = {}
        """Of the drafter, by slots and width."""
        self._pause = 0
        """Steps before it is tried again, after blocks or memory were short."""

    @property
    def running(self) -> bool:
        """Whether sequences have seats; their steps are launched here and nowhere else."""
        return self._seats is not None

    def wanted(self, lives: list[Live]) -> bool:
        """Whether all running requests could go on here from their next step on, and that seems faster. Looks at no token."""
        sequences = self._scheduler.running
        if self._pause:
            self._pause -= 1
            return False
        if not sequences or self._scheduler.waiting or len(lives) != len(sequences):
            return False
        if not all(sequence.decoding for sequence in sequences) or not all(suits(sequence.request) for sequence in sequences):
            return False
        found = self._speculator.on_device({live.drafter for live in lives})
        if found is None or _slots(len(lives)) * (found[1].drafts_per_pass + 1) > MAX_ROWS:
            return False
        return bool(self.ways.on_device(len(lives)) and found[1].follows(sequences).all())

    def enter(self, lives: list[Live]) -> None:
        """Gives all running sequences, whose texts are known, seats; nothing changes where that cannot be."""
        self._pause = _PAUSE
        found = self._speculator.on_device({live.drafter for live in lives})
        if found is None or not lives:
            return
        name, drafter = found
        size, ahead = self._scheduler.pool.block_size, drafter.drafts_per_pass + 1
        first = [drafter.knows_from(live.sequence) for live in lives]
        if any(block * size >= live.sequence.num_computed for block, live in zip(first, lives, strict=True)):
            return
        longest = max(max(live.sequence.limit, live.sequence.num_tokens) for live in lives) + 3 * ahead
        made = self._pipeline(drafter, _slots(len(lives)), -(-longest // size))
        if made is None or not self._grow(lives, ahead):
            return
        pipeline, blocks = made
        for slot in range(pipeline.table_shape[0]):
            pipeline.retire(slot)
        for slot, (live, block) in enumerate(zip(lives, first, strict=True)):
            sequence, sampling = live.sequence, live.sequence.request.sampling
            pipeline.enter(
                slot, last=int(sequence.tokens[-1]), length=sequence.num_computed, left=sequence.room,
                blocks=sequence.blocks[: pipeline.table_shape[1]], made=sequence.num_generated, seed=self._table.seed(sequence.slot),
                temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, grows=True,
            )  # fmt: skip
            blocks.enter(slot, block)
        sent = np.full(pipeline.table_shape, -1, np.int32)
        self._seats = _Seats(pipeline, blocks, name, dict(enumerate(lives)), pipeline.max_drafts, sent)
        self._pause = 0

    def stays(self, lives: list[Live]) -> bool:
        """Whether the next step can be made here as well."""
        seats = self._seats
        if seats is None or self._scheduler.waiting or len(lives) != len(seats.lives) or _slots(len(lives)) < seats.slots:
            return False
        found = self._speculator.on_device({live.drafter for live in lives})
        return found is not None and found[1] is self._drafter and self.ways.on_device(len(lives))

    def launch(self, step: int, clock: DeviceClock | HostClock) -> DeviceFlight | None:
        """Starts step number `step`; None where there are no blocks for it, with nothing done."""
        seats = self._seats
        assert seats is not None
        lives = list(seats.lives.values())
        if not self._grow(lives, (seats.pipeline.in_flight + 1) * (seats.pipeline.max_drafts + 1)):
            self._pause = _PAUSE
            return None
        self._send_tables(seats)
        self._trust(seats)
        each = max(seats.each, 1) if step % _LOOK_EVERY == 0 else seats.each
        timing = clock.start()
        seats.pipeline.launch(each)
        timing.stop()
        for live in lives:
            live.in_flight += 1
        return DeviceFlight(self, dict(seats.lives), timing)

    def land(self, flight: DeviceFlight) -> Landed:
        """See `DeviceFlight.land`."""
        seats = self._seats
        assert seats is not None
        result = seats.pipeline.collect()
        made = [slot for slot in flight.lives if result.counts[slot] > 0]
        resting = [live for slot, live in flight.lives.items() if result.counts[slot] == 0]
        nanoseconds = flight.timing.nanoseconds()
        if not made:
            return Landed(None, [], resting, nanoseconds)
        lives = [flight.lives[slot] for slot in made]
        sequences = [live.sequence for live in lives]
        proposal = self._speculator.late(
            seats.name, sequences, result.drafts[made], result.bins[made], result.drafted[made], result.verified[made]
        )
        if proposal.groups:
            remaining = self._scheduler.remaining(sequences)
            capacity = self._speculator.capacity(proposal, sequences, self._speculator.weights(sequences, remaining))
            seats.each = min(self._allowed(seats), key=lambda each: abs(each - capacity / seats.slots))
        plan = StepPlan(decoding=[Chunk(sequence, sequence.num_tokens - 1, 1) for sequence in sequences])
        work = Work.of(plan, proposal, self._scheduler.tables.rows, self._scheduler.pool.block_size)
        accepted, finite = result.counts[made] - 1, result.finite[made]
        following = result.tokens[made, accepted]
        self._saw(work, accepted)
        return Landed((work, Outcome(accepted, following, finite, {}, nanoseconds)), lives, resting, nanoseconds)

    def retire(self, sequence: Sequence) -> None:
        """A sequence ended: it has no part in the steps after those that are launched."""
        seats = self._seats
        for slot in [] if seats is None else [slot for slot, live in seats.lives.items() if live.sequence is sequence]:
            assert seats is not None
            seats.pipeline.retire(slot)
            del seats.lives[slot]

    def leave(self, *, failed: bool = False) -> None:
        """The host goes on; what is in flight is dropped. failed: there was no memory for a step."""
        if self._seats is not None:
            while self._seats.pipeline.in_flight:
                self._seats.pipeline.collect()
        if failed:
            self._made.clear()
            self._pause = _PAUSE
        self._seats = None

    def _pipeline(self, drafter: DraftsOnDevice, slots: int, blocks: int) -> tuple[DecodePipeline, DeviceBlocks] | None:
        """For tables of so many blocks at least; None where the memory for graphs is used up."""
        if drafter is not self._drafter:
            self._made.clear()
            self._drafter = drafter
        width = _WIDTHS
        while width < blocks:
            width *= _WIDTHS
        if (slots, width) not in self._made:
            runner, drafts = self._runner, drafter.drafts_per_pass
            if not runner.may_capture:
                return None
            part = drafter.on_device(slots)
            pipeline = DecodePipeline(
                runner.model, runner.kv, slots=slots, width=width, capture=runner.capture, max_drafts=drafts, drafter=part
            )
            self._made[slots, width] = pipeline, part
        return self._made[slots, width]

    def _allowed(self, seats: _Seats) -> list[int]:
        most = seats.pipeline.max_drafts
        return sorted({*(each for each in _EACH if each < most), most})

    def _grow(self, lives: list[Live], tokens: int) -> bool:
        """Blocks for so many tokens after each one's last, without taking any from anybody."""
        return all(self._scheduler.grant_drafts(live.sequence, tokens) >= tokens for live in lives)

    def _send_tables(self, seats: _Seats) -> None:
        """Blocks are added as texts grow, and exchanged where somebody else has the same text."""
        rows = self._scheduler.tables.rows
        tables = np.zeros_like(seats.sent)
        slots = list(seats.lives)
        width = min(rows.shape[1], tables.shape[1])
        tables[slots, :width] = rows[[seats.lives[slot].sequence.slot for slot in slots], :width]
        for slot in slots:
            tables[slot, len(seats.lives[slot].sequence.blocks) :] = 0
        if not np.array_equal(tables, seats.sent):
            seats.sent = tables
            seats.pipeline.set_tables(tables)

    def _trust(self, seats: _Seats) -> None:
        sequences = [live.sequence for live in seats.lives.values()]
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        shifts, weights = np.zeros(seats.slots), np.ones(seats.slots)
        logits, shifts[list(seats.lives)] = self._speculator.trust(seats.name, slots)
        weights[list(seats.lives)] = self._speculator.weights(sequences, self._scheduler.remaining(sequences))
        seats.blocks.trust(logits, shifts, weights)

    def _saw(self, work: Work, accepted: Ints) -> None:
        """The drafter's own account of what it was shown; of a sequence that has left, others may have the blocks."""
        assert self._drafter is not None
        step = work.step
        rows = [
            np.arange(start, start + count + 1)
            for start, count, chunk in zip(step.query_start[:-1].tolist(), accepted.tolist(), work.chunks, strict=True)
            if chunk.sequence.slot >= 0
        ]
        if rows:
            self._drafter.saw(step.slots[np.concatenate(rows)])


def _slots(requests: int) -> int:
    """Seats for so many: a power of four, for the same reason. Rows of empty seats go to the drafts of others."""
    return 4 ** (max(requests - 1, 0).bit_length() + 1 >> 1)
