"""What runs in the next step: admission, chunked prefill, block growth and preemption. No torch, no clock.

A step is one packed row of at most `max_step_tokens` tokens: first one token of every decoding sequence, then prefill chunks
in order of admission; what is left over may be filled with drafts. Where every sequence drafts a fixed number, prefill leaves room for
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.kv_blocks import ROOT
from engine.sequence import Sequence
from engine.waiting import LengthEstimator, WaitingQueue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.kv_blocks import BlockPool
    from engine.types import Request

_RECOVERY = 64
"""Steps that must go well after one failed for want of memory before steps may become larger again."""
_PATIENCE = 4
"""A waiting request is passed over by at most this many full batches of what came after it."""


_SCORED_TOKENS = 256
"""Prompt tokens of a step that have logits at most: 256 rows over 150,000 tokens are 150 MB."""


class UnfitRequestError(ValueError):
    """The request can never run here; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` confirmed tokens of `sequence`, from `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last confirmed token, so that a new one is sampled."""
        return self.start + self.count == self.sequence.num_tokens

    @property
    def scored(self) -> int:
        """How many of its leading tokens have a successor in the prompt whose log-probability is wanted."""
        sequence = self.sequence
        if not sequence.request.sampling.prompt_logprobs:
            return 0
        return max(0, min(self.start + self.count, sequence.prompt_length - 1) - self.start)


@dataclass(frozen=True, slots=True)
class Copy:
    """To be made before a step: block `target` begins with the same `count` tokens as block `source`, which an earlier step computed."""

    source: int
    target: int
    count: int


@dataclass(slots=True)
class StepPlan:
    """`decoding` chunks have one token each. `admitted` got a slot just now. `unfit` cannot go on even alone, and were let go."""

    decoding: list[Chunk] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    unfit: list[Sequence] = field(default_factory=list)
    preempted: int = 0

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk.count for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        return len(self.decoding) + self.prefill_tokens


class BlockTables:
    """int32 [max_sequences, widest]: row `slot` lists the blocks of the sequence in that slot."""

    def __init__(self, max_sequences: int) -> None:
        self.rows: NDArray[np.int32] = np.zeros((max_sequences, 16), np.int32)

    def write(self, sequence: Sequence, first: int = 0) -> None:
        """Copies `sequence.blocks[first:]` into its row."""
        width = len(sequence.blocks)
        if width > self.rows.shape[1]:
            grown = np.zeros((len(self.rows), max(width, 2 * self.rows.shape[1])), np.int32)
            grown[:, : self.rows.shape[1]] = self.rows
            self.rows = grown
        self.rows[sequence.slot, first:width] = sequence.blocks[first:]


class Scheduler:
    """Holds every sequence from `add` to `finish`. Not thread-safe: one engine thread drives it."""

    def __init__(self, pool: BlockPool, *, max_sequences: int, max_step_tokens: int, max_positions: int, fixed_drafts: int = 0) -> None:
        """fixed_drafts: of every decoding sequence."""
        most_chunk = max_step_tokens - max_sequences * fixed_drafts
        if not 1 <= max_sequences <= most_chunk:
            raise ValueError(f"1 <= max_sequences <= max_step_tokens must hold, got {max_sequences} and {most_chunk} beside drafts")
        self.pool = pool
        self.tables = BlockTables(max_sequences)
        self.max_step_tokens = max_step_tokens
        """What a step may hold now: less than what was asked for while memory is short (see `give_up`)."""
        self._most_step_tokens = max_step_tokens
        self._went_well = 0
        self.max_sequences = max_sequences
        self.batch = max_sequences
        """Sequences that run together: fewer than could where more would not be faster."""
        self.chunk = most_chunk
        """Prompt tokens of a step at most."""
        self._max_positions = max_positions
        self._fixed_drafts = fixed_drafts
        self._lengths = LengthEstimator()
        self.waiting = WaitingQueue(self._lengths, patience=_PATIENCE * max_sequences)
        self.running: list[Sequence] = []
        """In order of admission; the last one is preempted first."""
        self._slots = list(range(max_sequences - 1, -1, -1))
        self._next_serial = 0

    def add(self, request: Request) -> Sequence:
        """Queues a request. Raises UnfitRequestError where it could never run."""
        length = len(request.prompt_token_ids)
        if length == 0:
            raise UnfitRequestError("the prompt has no tokens")
        if length >= self._max_positions:
            raise UnfitRequestError(f"the prompt has {length} tokens; the model's context is {self._max_positions}, the answer included")
        if self.pool.blocks_for(length + 1) > self.pool.capacity:
            raise UnfitRequestError(
                f"the prompt has {length} tokens; this worker's whole KV cache holds {self.pool.capacity * self.pool.block_size}"
            )
        sequence = Sequence(request, self._next_serial, self._max_positions)
        self._next_serial += 1
        self.waiting.push(sequence)
        return sequence

    def schedule(self) -> StepPlan:
        """Plans one step: grows, preempts and admits as needed. Chunks must then really be run, and `complete`d."""
        plan = StepPlan()
        self.pool.begin_step()
        self._recover()
        self._plan_decoding(plan)
        self._admit(plan)
        self._plan_prefill(plan)
        return plan

    def give_up(self, plan: StepPlan, num_tokens: int) -> int:
        """Takes back a planned step of `num_tokens` (drafts included) that did not run for want of memory; later ones hold half as much.

        Whoever was not decoding yet starts again: the plan counted its KV as computed, and siblings may have built on that. Of the others
        those stay that the smaller step has room for. Returns how many were preempted. Raises ValueError for a step that cannot shrink.
        """
        if num_tokens < 2:
            raise ValueError("a step of one token cannot be made smaller")
        self.max_step_tokens, self._went_well = max(num_tokens // 2, 1), 0
        size = self.pool.block_size
        for chunk in plan.prefill:
            self.pool.forget(chunk.sequence.blocks[chunk.start // size : (chunk.start + chunk.count) // size])
        decoding = [sequence for sequence in self.running if sequence.decoding]
        kept = {sequence.serial for sequence in decoding[: self.max_step_tokens]}
        leaving = [sequence for sequence in self.running if sequence.serial not in kept]
        for sequence in reversed(leaving):
            self._leave(sequence)
            self.waiting.push_front(sequence)
        return len(leaving)

    def remaining(self, sequences: list[Sequence]) -> NDArray[np.float64] | None:
        """float64 [S]: how many more tokens each will probably have; None while somebody waits who would take the place of one that ends.

        One that has outgrown what was expected of it is expected to go on for half of that again.
        """
        if self.waiting:
            return None
        expected = np.array([self._lengths.expected(sequence.request) for sequence in sequences])
        left = expected - np.array([sequence.num_generated for sequence in sequences])
        room = np.array([sequence.room for sequence in sequences], np.float64)
        return np.asarray(np.maximum(np.minimum(np.maximum(left, expected / 2), room), 1.0))

    def answers(self) -> float:
        """Tokens that the answers of those who run will probably have, together."""
        return sum(self._lengths.expected(sequence.request) for sequence in self.running)

    def grant_drafts(self, sequence: Sequence, wanted: int) -> int:
        """Makes room for up to `wanted` drafted tokens after the next one; returns how many fit without preempting anyone."""
        missing = self.pool.blocks_for(sequence.num_tokens + wanted) - len(sequence.blocks)
        if (granted := min(missing, self.pool.num_free)) > 0:
            self._extend(sequence, granted)
        return min(wanted, len(sequence.blocks) * self.pool.block_size - sequence.num_tokens)

    def complete(self, chunk: Chunk, sampled: NDArray[np.int64], num_valid: int) -> None:
        """Books a chunk that ran: `sampled` tokens are confirmed, and KV is valid for `num_valid` positions from its start."""
        sequence = chunk.sequence
        sequence.append(sampled)
        sequence.num_computed = chunk.start + num_valid
        sequence.decoding = bool(len(sampled))
        sequence.reach(sequence.num_computed)
        self._publish(sequence, sequence.num_computed)

    def promise(self, chunk: Chunk) -> None:
        """Books a chunk without drafts that was launched: the token that it samples counts, and is known once it is `settle`d."""
        sequence = chunk.sequence
        sequence.decoding = chunk.samples
        if sequence.decoding:
            sequence.promise()
        sequence.num_computed = chunk.start + chunk.count
        sequence.reach(sequence.num_computed)

    def settle(self, chunk: Chunk, token: int | None) -> None:
        """The token that was promised for a chunk, None for one that sampled nothing."""
        if token is not None:
            chunk.sequence.fulfil(token)
        self._publish(chunk.sequence, chunk.start + chunk.count)

    def grows_freely(self) -> bool:
        """Whether the next step has blocks for all who decode, so that nobody is preempted."""
        going = [sequence for sequence in self.running if sequence.decoding and sequence.room > 0]
        return sum(max(self.pool.blocks_for(s.num_tokens) - len(s.blocks), 0) for s in going) <= self.pool.num_free

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        """Enters full blocks into the prefix tree; the tokens before `num_computed` are known."""
        full = num_computed // self.pool.block_size
        changed = False
        while sequence.num_published < full and not sequence.private:
            index = sequence.num_published
            before = sequence.blocks[index]
            sequence.private = not self.pool.publish(sequence.blocks, index, sequence.tokens, sequence.serial)
            changed |= sequence.blocks[index] != before
            sequence.num_published += 1
        if changed:
            self.tables.write(sequence)

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        """Takes out a sequence that ended, was aborted or failed, wherever it is; a `complete` one teaches the length of its kind."""
        if sequence.slot >= 0:
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if complete:
            self.waiting.learn(sequence.request, sequence.num_generated)

    def _recover(self) -> None:
        """Memory that was short may have come back: every so many steps that went well, steps may hold twice as much."""
        if self.max_step_tokens == self._most_step_tokens:
            return
        self._went_well += 1
        if self._went_well > _RECOVERY:
            self.max_step_tokens, self._went_well = min(2 * self.max_step_tokens, self._most_step_tokens), 0

    def _plan_decoding(self, plan: StepPlan) -> None:
        for sequence in list(self.running):
            # One that an earlier turn of this loop preempted is no longer decoding.
            # Nor does one go on whose last token is on its way.
            if sequence.decoding and sequence.room > 0 and self._grow(sequence, sequence.num_tokens, plan):
                plan.decoding.append(Chunk(sequence, sequence.num_computed, 1))

    def _grow(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> bool:
        """Blocks for `num_tokens`, taken from the last admitted if need be. False where the sequence itself had to go."""
        missing = self.pool.blocks_for(num_tokens) - len(sequence.blocks)
        while missing > self.pool.num_free:
            victim = self.running[-1]
            if victim is sequence and len(self.running) == 1:
                self._leave(sequence)
                plan.unfit.append(sequence)
                return False
            self._leave(victim)
            self.waiting.push_front(victim)
            plan.preempted += 1
            if victim is sequence:
                return False
        if missing > 0:
            self._extend(sequence, missing)
        return True

    def _admit(self, plan: StepPlan) -> None:
        while self._slots and len(self.running) < min(self.batch, self.max_step_tokens) and (sequence := self.waiting.peek()) is not None:
            shares = not sequence.request.sampling.prompt_logprobs
            known = self.pool.match(sequence.tokens, (sequence.num_tokens - 1) // self.pool.block_size if shares else 0)
            needed = self.pool.blocks_for(sequence.num_tokens) - len(known)
            if self.running and needed + self._reserve() > self.pool.available_beside(known):
                break
            self.waiting.remove(sequence)
            self._enter(sequence, known, needed)
            plan.admitted.append(sequence)

    def _reserve(self) -> int:
        """Blocks kept for the growth of those who run: half of what they are expected to need, for they do not peak together."""
        expected = sum(max(self._lengths.expected(s.request) - s.num_generated, 1.0) for s in self.running)
        return len(self.running) + int(expected / 2 / self.pool.block_size)

    def _enter(self, sequence: Sequence, known: list[int], needed: int) -> None:
        self.pool.hold(known)
        sequence.blocks = known + self.pool.allocate(needed)
        sequence.num_matched = len(known)
        sequence.num_published = max(len(known), (sequence.num_tokens - 1) // self.pool.block_size)
        # One whose prompt is scored computes what others may know already, and keeps it to itself.
        sequence.private = sequence.request.sampling.prompt_logprobs
        if not sequence.private:
            self.pool.announce(sequence.blocks, len(known), sequence.num_published, sequence.tokens, sequence.serial)
        sequence.slot = self._slots.pop()
        self.running.append(sequence)
        self.tables.write(sequence)

    def _plan_prefill(self, plan: StepPlan) -> None:
        free = self.max_step_tokens - len(plan.decoding)
        # While memory is short, drafts do not keep others from starting.
        budget = min(free - min(len(plan.decoding) * self._fixed_drafts, free // 2), self.chunk)
        scored = _SCORED_TOKENS
        for sequence in self.running:
            if budget <= 0:
                break
            count = 0 if sequence.decoding else min(self._computable(sequence, plan), budget)
            if sequence.request.sampling.prompt_logprobs:
                count = min(count, scored)
                scored -= count
            if count:
                plan.prefill.append(self._chunk(sequence, count))
                budget -= count

    def _computable(self, sequence: Sequence, plan: StepPlan) -> int:
        """Tokens that may be computed now: past what is already there, up to what somebody else is computing."""
        size, pool = self.pool.block_size, self.pool
        index = sequence.num_computed // size
        while index < sequence.num_matched and sequence.num_computed == index * size and not pool.is_pending(sequence.blocks[index]):
            index += 1
            sequence.num_computed += size
            sequence.ledger.cached += sequence.reach(sequence.num_computed)
        if index == sequence.num_matched and sequence.num_computed == index * size and not sequence.private:
            self._copy_beginning(sequence, plan)
        stop = index
        while stop < sequence.num_matched and pool.is_pending(sequence.blocks[stop]) and pool.claim(sequence.blocks[stop], sequence.serial):
            stop += 1
        end = sequence.num_tokens if stop == sequence.num_matched or index >= sequence.num_matched else stop * size
        return end - sequence.num_computed

    def _copy_beginning(self, sequence: Sequence, plan: StepPlan) -> None:
        """Texts part inside a block: what its first own block has in common with another that is computed need not be computed again."""
        index, first = sequence.num_matched, sequence.num_computed
        last = min(first + self.pool.block_size, sequence.num_tokens - 1)  # something must be left to sample from
        source, count = self.pool.nearest(sequence.blocks[index - 1] if index else ROOT, sequence.tokens[first:last])
        if count:
            plan.copies.append(Copy(source, sequence.blocks[index], count))
            sequence.num_computed += count
            sequence.ledger.cached += sequence.reach(sequence.num_computed)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        start = sequence.num_computed
        size = self.pool.block_size
        self.pool.mark_computed(sequence.blocks[start // size : (start + count) // size])
        sequence.ledger.recomputed += max(0, min(sequence.high_water, start + count) - start)
        sequence.ledger.prefilled += sequence.reach(start + count)
        return Chunk(sequence, start, count)

    def _extend(self, sequence: Sequence, count: int) -> None:
        first = len(sequence.blocks)
        sequence.blocks += self.pool.allocate(count)
        self.tables.write(sequence, first)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.pool.release(sequence.blocks, sequence.serial)
        sequence.leave()
