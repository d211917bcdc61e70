"""The scheduler and the block pool, driven without a model: what each slot holds is tracked, and every read is checked."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv_blocks import BlockPool
from engine.scheduler import Chunk, Scheduler, StepPlan, UnfitRequestError
from engine.sequence import Sequence
from engine.types import Request, SamplingParams

BLOCK = 4


def request(name: str, prompt: list[int], max_tokens: int, **fields) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0), **fields)


def scheduler(num_blocks: int = 65, max_sequences: int = 8, max_step_tokens: int = 32, share: bool = True, **fields: int) -> Scheduler:
    pool = BlockPool(num_blocks, BLOCK, share_prefixes=share)
    return Scheduler(pool, max_sequences=max_sequences, max_step_tokens=max_step_tokens, max_positions=10_000, **fields)


class World:
    """Stands in for model and KV memory: slot -> the whole text up to and including the token stored there."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.memory: dict[int, tuple[int, ...]] = {}
        self.computed = self.copied = 0
        self.finished: dict[str, Sequence] = {}
        self.unfit: list[str] = []

    def slot(self, sequence: Sequence, position: int) -> int:
        row = self.scheduler.tables.rows[sequence.slot]
        return int(row[position // BLOCK]) * BLOCK + position % BLOCK

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.unfit += [sequence.request.id for sequence in plan.unfit]
        assert plan.num_tokens <= self.scheduler.max_step_tokens
        assert plan.num_tokens or plan.unfit
        drafts = {}
        for chunk in plan.decoding:
            wanted = min(self.rng.randrange(4), self.scheduler.max_step_tokens - plan.num_tokens, max(chunk.sequence.room - 1, 0))
            drafts[chunk.sequence.serial] = self.scheduler.grant_drafts(chunk.sequence, wanted)
        self.copy(plan)
        chunks = plan.decoding + plan.prefill
        written: set[int] = set()
        for chunk in chunks:
            written |= self.write(chunk, drafts.get(chunk.sequence.serial, 0), written)
        for chunk in chunks:
            for position in range(chunk.start + chunk.count):
                text = tuple(chunk.sequence.tokens[: position + 1].tolist())
                assert self.memory[self.slot(chunk.sequence, position)] == text, "read what somebody else wrote"
        for chunk in chunks:
            self.confirm(chunk, drafts.get(chunk.sequence.serial, 0))
        self.scheduler.pool.check()
        return plan

    def copy(self, plan: StepPlan) -> None:
        slots = [(copy.source * BLOCK + index, copy.target * BLOCK + index) for copy in plan.copies for index in range(copy.count)]
        self.copied += len(slots)
        texts = [self.memory[source] for source, _ in slots]  # all of them before any is written
        self.memory.update(zip((target for _, target in slots), texts, strict=True))

    def write(self, chunk: Chunk, drafted: int, written: set[int]) -> set[int]:
        tokens = chunk.sequence.tokens.tolist()
        slots = set()
        for position in range(chunk.start, chunk.start + chunk.count + drafted):
            slot = self.slot(chunk.sequence, position)
            assert slot >= BLOCK, "block 0 is nobody's"
            assert slot not in written, "two sequences write to one slot"
            slots.add(slot)
            self.memory[slot] = tuple(tokens[: position + 1]) if position < len(tokens) else ("draft",)
        self.computed += chunk.count
        return slots

    def confirm(self, chunk: Chunk, drafted: int) -> None:
        sequence = chunk.sequence
        if not chunk.samples:
            self.scheduler.complete(chunk, np.empty(0, np.int64), chunk.count)
            return
        accepted = self.rng.randint(0, drafted)
        sampled = np.array([self.rng.randrange(50) for _ in range(accepted + 1)], np.int64)
        for index in range(accepted):
            position = chunk.start + chunk.count + index
            self.memory[self.slot(sequence, position)] = tuple(sequence.tokens.tolist()) + tuple(sampled[: index + 1].tolist())
        self.scheduler.complete(chunk, sampled, chunk.count + accepted)
        if sequence.room == 0:
            self.finished[sequence.request.id] = sequence
            self.scheduler.finish(sequence, complete=True)

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not len(self.scheduler.waiting)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(18, 60),
    max_sequences=st.integers(1, 9),
    budget=st.integers(9, 40),
    share=st.booleans(),
)
def test_every_request_finishes_and_reads_only_its_own_text(
    seed: int, num_blocks: int, max_sequences: int, budget: int, share: bool
) -> None:
    rng = random.Random(seed)
    world = World(scheduler(num_blocks, max_sequences, budget, share), rng)
    documents = [[rng.randrange(50) for _ in range(rng.randint(1, 30))] for _ in range(3)]
    waiting = []
    for number in range(rng.randint(1, 25)):
        document = rng.choice(documents)
        prompt = document[: rng.randint(1, len(document))] + [rng.randrange(50) for _ in range(rng.randint(0, 6))]
        waiting.append(request(str(number), prompt, rng.randint(1, 30), template=rng.choice(["a", None]), priority=rng.randrange(2)))
    expected = {r.id for r in waiting}
    aborted = set()
    for _ in range(3000):
        if waiting and rng.random() < 0.4:
            world.scheduler.add(waiting.pop())
        if world.scheduler.running and rng.random() < 0.02:
            victim = rng.choice(world.scheduler.running)
            world.scheduler.finish(victim, complete=False)
            aborted.add(victim.request.id)
        if not world.idle:
            world.step()
        elif not waiting:
            break
    assert set(world.finished) | aborted == expected
    assert not world.unfit
    assert world.scheduler.pool.num_held == 0
    for sequence in world.finished.values():
        ledger = sequence.ledger
        assert ledger.prompt == ledger.cached + ledger.prefilled


def test_prompts_leave_room_for_a_fixed_number_of_drafts() -> None:
    """However much is to be read; and where memory is short, reading goes on all the same."""
    drafts = 5
    one = scheduler(num_blocks=600, max_sequences=6, max_step_tokens=10 + 6 * drafts, fixed_drafts=drafts)
    assert one.chunk == 10
    world = World(one, random.Random(0))
    for number in range(40):
        one.add(request(str(number), list(range(number, number + 30)), 12))
    shared = 0
    while not world.idle:
        plan = world.step()
        assert plan.num_tokens + drafts * len(plan.decoding) <= one.max_step_tokens
        assert not one.running or plan.prefill or plan.decoding
        shared += bool(plan.prefill and plan.decoding)
    assert shared > 40, "prompts were hardly ever read beside decoding"
    one.max_step_tokens = 8
    for number in range(6):
        one.add(request(f"late {number}", [number] * 9, 200))
    assert max(len(world.step().decoding) for _ in range(60)) == 6


def test_siblings_admitted_together_compute_their_prefix_once() -> None:
    prefix = list(range(40))
    world = World(scheduler(max_sequences=8, max_step_tokens=64), random.Random(0))
    for number in range(8):
        world.scheduler.add(request(str(number), [*prefix, 60 + number], 1))
    while not world.idle:
        world.step()
    assert world.computed == 40 + 8
    assert sorted(sequence.ledger.cached for sequence in world.finished.values()) == [0] + [40] * 7


def test_texts_that_part_inside_a_block_are_computed_once_up_to_there() -> None:
    prefix = list(range(10))
    world = World(scheduler(), random.Random(0))
    for name, rest in (("first", [30, 31, 32]), ("second", [30, 33, 34]), ("third", [40]), ("scored", [41])):
        scored = {"prompt_logprobs": True, "logprobs": 0} if name == "scored" else {}
        world.scheduler.add(Request(name, (*prefix, *rest), SamplingParams(max_tokens=1, temperature=0.0, **scored)))
        while not world.idle:
            world.step()
    assert [world.finished[name].ledger.cached for name in ("first", "second", "third", "scored")] == [0, 11, 10, 0]
    assert world.copied == 3 + 2
    assert world.computed == 13 + 2 + 1 + 11


def test_the_token_that_is_sampled_from_is_always_computed() -> None:
    world = World(scheduler(), random.Random(0))
    for name in ("first", "second"):
        world.scheduler.add(request(name, list(range(8)), 1))
        while not world.idle:
            world.step()
    assert world.finished["second"].ledger.cached == 7


def test_a_sibling_takes_over_a_prefix_whose_owner_left() -> None:
    prefix = list(range(40))
    world = World(scheduler(max_sequences=2, max_step_tokens=12), random.Random(0))
    first = world.scheduler.add(request("first", [*prefix, 60], 1))
    world.scheduler.add(request("second", [*prefix, 61], 1))
    world.step()
    world.scheduler.finish(first, complete=False)
    while not world.idle:
        world.step()
    assert set(world.finished) == {"second"}
    assert world.computed == 41


def test_a_finished_answer_is_a_cached_prefix_for_what_continues_it() -> None:
    world = World(scheduler(), random.Random(0))
    world.scheduler.add(request("first", list(range(10)), 11))
    while not world.idle:
        world.step()
    text = world.finished["first"].tokens.tolist()
    world.scheduler.add(request("second", [*text, 1], 1))
    while not world.idle:
        world.step()
    assert world.finished["second"].ledger.cached == 20


def test_without_sharing_nothing_is_cached() -> None:
    world = World(scheduler(share=False), random.Random(0))
    for number in range(4):
        world.scheduler.add(request(str(number), list(range(12)), 1))
    while not world.idle:
        world.step()
    assert world.computed == 48


def test_oldest_sequences_survive_when_blocks_run_out() -> None:
    world = World(scheduler(num_blocks=12, max_sequences=4, max_step_tokens=16), random.Random(0))
    for number in range(4):
        world.scheduler.add(request(str(number), [number] * 4, 30))
    preempted = 0
    order = []
    while not world.idle:
        preempted += world.step().preempted
        order += [name for name in world.finished if name not in order]
    assert preempted > 0
    assert order[0] == "0"
    assert sum(sequence.ledger.recomputed for sequence in world.finished.values()) > 0


def test_a_request_that_outgrows_the_whole_pool_is_let_go_and_the_rest_finish() -> None:
    world = World(scheduler(num_blocks=6, max_sequences=2, max_step_tokens=8), random.Random(0))
    world.scheduler.add(request("endless", [1, 2, 3], 1000))
    world.scheduler.add(request("short", [4, 5, 6], 2))
    while not world.idle:
        world.step()
    assert world.unfit == ["endless"]
    assert set(world.finished) == {"short"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), ([1] * 20_000, "context is 10000"), ([1] * 400, "KV cache holds 256")],
)
def test_what_can_never_run_is_refused_with_the_reason(prompt: list[int], message: str) -> None:
    with pytest.raises(UnfitRequestError, match=message):
        scheduler().add(request("x", prompt, 1))


def test_order_is_priority_then_deadline_then_shared_prefix_then_length() -> None:
    one = scheduler(max_sequences=8)
    one.add(request("plain", [1], 5))
    one.add(request("template-short", [2], 6, template="t"))
    one.add(request("longest", [3], 20))
    one.add(request("soon", [4], 1, deadline=10.0))
    one.add(request("template-long", [5], 7, template="t"))
    one.add(request("urgent", [6], 1, priority=1))
    order = []
    while (sequence := one.waiting.peek()) is not None:
        order.append(sequence.request.id)
        one.waiting.remove(sequence)
    assert order == ["urgent", "soon", "longest", "template-long", "template-short", "plain"]


def test_length_is_learned_from_finished_siblings() -> None:
    world = World(scheduler(max_sequences=1), random.Random(0))
    world.scheduler.add(request("a", [1], 2, template="short"))
    while not world.idle:
        world.step()
    world.scheduler.add(request("b", [2], 50, template="short"))
    world.scheduler.add(request("c", [3], 10, template="unknown"))
    first = world.scheduler.waiting.peek()
    assert first is not None
    assert first.request.id == "c"


def test_who_waits_is_ordered_by_what_was_learned_since() -> None:
    """All of a job is queued before anything of it is known; its templates move as their first answers end."""
    one = scheduler(max_sequences=64, max_step_tokens=64)
    made = {name: one.add(request(name, [ord(name[0])], 50, template=name[0])) for name in ("a1", "a2", "b1", "b2", "c1", "c2")}

    def order() -> list[str]:
        taken, names = [], []
        while (sequence := one.waiting.peek()) is not None:
            taken.append(sequence)
            names.append(sequence.request.id)
            one.waiting.remove(sequence)
        for sequence in sorted(taken, key=lambda sequence: sequence.serial):
            one.waiting.push(sequence)
        return names

    assert order() == ["a1", "a2", "b1", "b2", "c1", "c2"]
    one.waiting.learn(made["a1"].request, 3)
    assert order() == ["b1", "b2", "c1", "c2", "a1", "a2"]
    one.waiting.learn(made["b1"].request, 9)
    one.waiting.learn(made["c1"].request, 20)
    assert order() == ["c1", "c2", "b1", "b2", "a1", "a2"]
    for _ in range(40):
        one.waiting.learn(made["a2"].request, 45)
    assert order() == ["a1", "a2", "c1", "c2", "b1", "b2"]
    # More than a request may have is not expected of it.
    short = one.add(request("a0", [ord("a")], 10, template="a", priority=0))
    assert order()[:3] == ["a1", "a2", "a0"]
    one.finish(short, complete=False)
    assert order() == ["a1", "a2", "c1", "c2", "b1", "b2"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_next_to_start_is_always_of_the_group_that_ranks_first_now(seed: int) -> None:
    rng = random.Random(seed)
    one = scheduler(max_sequences=64, max_step_tokens=64)
    one.waiting._patience = 10**9
    alive = []
    for number in range(120):
        move = rng.random()
        if move < 0.5 or not alive:
            template = rng.choice(["a", "b", "c", None])
            alive.append(
                one.add(request(str(number), [1, rng.randrange(3)], rng.randint(1, 60), template=template, priority=rng.randrange(2)))
            )
        elif move < 0.7:
            one.waiting.learn(rng.choice(alive).request, rng.randint(1, 60))
        else:
            alive.remove(gone := rng.choice([one.waiting.peek(), rng.choice(alive)]))
            one.waiting.remove(gone)
        first = one.waiting.peek()
        assert (first is None) == (not alive)
        if first is not None:
            assert first in alive
            assert first.request.priority == max(s.request.priority for s in alive)
            groups = one.waiting._groups
            best = min(
                groups,
                key=lambda name: (
                    -name[0],
                    name[1],
                    -one._lengths.of(name[2] if isinstance(name[2], str) else None, groups[name].limit),
                    groups[name].first,
                ),
            )
            assert one.waiting._name(first.request) == best


def test_how_much_is_left_is_told_once_nobody_waits() -> None:
    world = World(scheduler(max_sequences=2), random.Random(0))
    for name, limit in (("a", 40), ("b", 4), ("c", 30)):
        world.scheduler.add(request(name, [ord(name)], limit, template="t"))
    world.step()
    assert world.scheduler.remaining(world.scheduler.running) is None
    while world.scheduler.waiting:
        world.step()
    # Whoever ended taught how long such answers are; one that has outgrown that is given half of it again.
    [taught] = {len(s.output) for s in world.finished.values()}
    left = world.scheduler.remaining(world.scheduler.running)
    assert left is not None
    assert left.tolist() == [max(min(max(taught - s.num_generated, taught / 2), s.room), 1) for s in world.scheduler.running]


def test_nobody_starves_behind_a_stream_of_longer_requests() -> None:
    world = World(scheduler(max_sequences=2), random.Random(0))
    world.scheduler.add(request("patient", [1, 2], 1))
    for number in range(100):
        world.scheduler.add(request(f"long-{number}", [number, 3], 3))
        world.scheduler.add(request(f"more-{number}", [number, 4], 3))
        if "patient" in world.finished:
            break
        world.step()
    assert "patient" in world.finished


def test_eviction_forgets_the_longest_unused_text_and_never_a_parent_before_its_child() -> None:
    pool = BlockPool(5, BLOCK)
    tokens = np.arange(16)
    blocks = pool.allocate(4)
    pool.announce(blocks, 0, 4, tokens, owner=1)
    pool.mark_computed(blocks)
    pool.release(blocks, owner=1)
    assert pool.match(tokens, 4) == blocks
    pool.allocate(1)
    pool.check()
    assert pool.match(tokens, 4) == blocks[:3]
