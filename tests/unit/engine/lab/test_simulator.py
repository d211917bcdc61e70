"""The real scheduler over long virtual jobs: fill of steps, tail, starvation, preemption under a small cache, priority and deadline."""

from __future__ import annotations

import random
import sys
from subprocess import run

import pytest

from engine.lab.machine import CurveMachine
from engine.lab.simulator import Limits, Script, Simulation, Simulator
from engine.speculation.cost_model import CostModel, best_batch, best_chunk
from engine.types import Request, SamplingParams

CURVE = {1: 0.016, 2: 0.017, 4: 0.021, 8: 0.031, 16: 0.058, 32: 0.079, 64: 0.140, 128: 0.259, 256: 0.570}
"""Seconds of a step by tokens: a 135M model on two cores, weights prepacked."""
BLOCK = 16


def script(
    name: str, prompt: int, output: int, *, arrival: float = 0.0, max_tokens: int | None = None, start: tuple[int, ...] = (), **fields
):
    rng = random.Random(name)
    tokens = start + tuple(rng.randrange(1000) for _ in range(prompt - len(start)))
    answer = tuple(rng.randrange(1000) for _ in range(output))
    return Script(Request(name, tokens, SamplingParams(max_tokens=max_tokens or output, temperature=0.0), **fields), answer, arrival)


def limits(**fields) -> Limits:
    return Limits(**({"max_sequences": 16, "max_step_tokens": 256, "num_blocks": 4096, "block_size": BLOCK} | fields))


def job(count: int, seed: int = 0, **fields) -> list[Script]:
    rng = random.Random(seed)
    return [script(f"{seed}-{n}", rng.randint(20, 200), rng.randint(4, 120), **fields) for n in range(count)]


def test_it_needs_no_torch():
    code = "import sys, engine.lab.replay, engine.lab.simulator; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_answer_is_produced_whole_and_the_clock_is_the_machines():
    scripts = job(40)
    seen = []
    machine = CurveMachine(CURVE)
    result = Simulator(limits(), machine, watch=lambda step, _: seen.append(step)).run(scripts)
    assert result.generated == sum(len(s.output) for s in scripts) == sum(step.gained for step in seen)
    assert set(result.ended) == {s.request.id for s in scripts}
    assert result.seconds == pytest.approx(sum(machine.step(step.load) for step in seen))
    assert result.steps == len(seen)


def test_steps_are_full_until_the_tail():
    """As long as there are requests that wait, every slot decodes or prefills."""
    fill = []

    def watch(step, scheduler):
        if scheduler.waiting:
            fill.append(len(step.plan.decoding) + len(step.plan.prefill))

    Simulator(limits(), CurveMachine(CURVE), watch=watch).run(job(200))
    assert len(fill) > 300
    assert sum(count == 16 for count in fill) / len(fill) > 0.95


def test_the_tail_is_short_where_the_longest_start_first():
    """Siblings with a known template length: long ones first, so that the last ones to end are short."""
    rng = random.Random(5)
    kinds = {"short": 8, "middle": 40, "long": 160}
    scripts = []
    for n in range(300):
        kind = rng.choice(list(kinds))
        scripts.append(script(f"{n}", 30, kinds[kind], max_tokens=200, template=kind, start=(ord(kind[0]),) * 20))
    result = Simulator(limits(), CurveMachine(CURVE)).run(scripts)
    assert result.tail(0.05) < 0.15


def test_a_job_that_is_queued_whole_learns_its_lengths_as_it_goes():
    """Nothing is known when the lines are queued, and every one may have 200 tokens: the kind that needs them must not come last."""
    kinds = {"short": 6, "middle": 30, "long": 190}
    lines = [(kind, n) for kind in kinds for n in range(80)]
    scripts = [script(f"{kind}-{n}", 30, kinds[kind], max_tokens=200, template=kind, start=(ord(kind[0]),) * 20) for kind, n in lines]
    random.Random(1).shuffle(scripts)
    result = Simulator(limits(look_ahead=1000), CurveMachine(CURVE)).run(scripts)
    started = sorted(result.started, key=lambda name: result.started[name])
    late = started[len(started) // 2 :]
    assert sum(name.startswith("long") for name in late) < 0.1 * len(late)
    assert result.tail(0.05) < 0.1


LEVEL = {1: 0.020, 16: 0.020, 32: 0.040, 64: 0.080, 128: 0.160, 256: 0.320}
"""800 tokens a second from 16 rows on."""
SLOWER = LEVEL | {64: 0.080, 128: 0.200, 256: 0.500}
"""Steps that overflow a cache: 800 tokens a second at 64, 512 at 256."""


def tuned(curve: dict[int, float], scripts: list[Script], **fields) -> tuple[Simulation, list[int], Simulator]:
    """A run with what the curve says of batch and chunk, and the KV blocks held in each step."""
    machine, held = CurveMachine(curve), []
    cost = CostModel(256)
    cost.profile(machine.profile([1, 2, 4, 8, 16, 32, 64, 128, 256]))
    simulator = Simulator(limits(**fields), machine, watch=lambda _, scheduler: held.append(scheduler.pool.num_held))
    simulator.scheduler.batch = best_batch(cost, simulator.scheduler.max_sequences)
    simulator.scheduler.chunk = best_chunk(cost, simulator.scheduler.max_step_tokens)
    return simulator.run(scripts), held, simulator


def test_no_more_sequences_run_than_make_it_faster():
    """Where 16 sequences already decode at the machine's rate, 64 would be no faster and hold four times the KV."""
    scripts, held = job(200), []
    everyone = Simulator(limits(max_sequences=64), CurveMachine(LEVEL), watch=lambda _, scheduler: held.append(scheduler.pool.num_held))
    before = everyone.run(scripts)
    after, kept, simulator = tuned(LEVEL, scripts, max_sequences=64)
    assert simulator.scheduler.batch == 16
    assert after.seconds < 1.02 * before.seconds
    assert max(kept) < 0.4 * max(held)


def test_all_run_that_may_where_more_are_faster():
    _, _, simulator = tuned(CURVE, job(100), max_sequences=64)
    assert simulator.scheduler.batch == 64
    assert simulator.scheduler.chunk == 128  # 494 tokens a second, 449 at 256


def test_prompts_are_read_in_the_pieces_that_are_read_fastest():
    scripts = [script(f"{n}", 600, 4) for n in range(40)]
    before = Simulator(limits(), CurveMachine(SLOWER)).run(scripts)
    after, _, simulator = tuned(SLOWER, scripts)
    assert simulator.scheduler.chunk == 64
    assert after.seconds < 0.8 * before.seconds


def test_nobody_starves_under_a_stream_of_more_important_requests():
    """Urgent requests keep arriving; the unimportant one still starts, after a bounded number of them."""
    humble = script("humble", 50, 20, priority=0)
    stream = [script(f"urgent-{n}", 50, 20, arrival=n * 0.02, priority=9) for n in range(600)]
    result = Simulator(limits(max_sequences=4, look_ahead=8), CurveMachine(CURVE)).run([*stream, humble])
    overtook = sum(result.started[name] < result.started["humble"] for name in result.started)
    assert overtook < 100
    assert result.started["humble"] < result.seconds / 2


@pytest.mark.parametrize(("field", "first", "later"), [("priority", 9, 0), ("deadline", 100.0, 200.0)])
def test_priority_and_deadline_go_first(field, first, later):
    slow = [script(f"later-{n}", 30, 60, **{field: later}) for n in range(60)]
    quick = [script(f"first-{n}", 30, 60, **{field: first}) for n in range(20)]
    result = Simulator(limits(max_sequences=8, look_ahead=100), CurveMachine(CURVE)).run([*slow, *quick])
    started = sorted(result.started, key=lambda name: result.started[name])
    assert sum(name.startswith("first") for name in started[:20]) == 20


def test_a_small_cache_preempts_and_still_finishes():
    scripts = [script(f"{n}", 40, 200, max_tokens=200, template="t") for n in range(24)]
    short = [script(f"lesson-{n}", 40, 4, max_tokens=200, template="t", priority=1) for n in range(24)]
    # The lessons teach that answers are short, so many long ones are let in at once: more than the cache holds.
    held = []

    def watch(_, scheduler):
        scheduler.pool.check()
        held.append(scheduler.pool.num_held)

    result = Simulator(limits(num_blocks=100), CurveMachine(CURVE), watch=watch).run([*short, *scripts])
    assert result.preemptions > 0
    assert result.generated == sum(len(s.output) for s in [*short, *scripts])
    assert max(held) <= 99


def test_a_shared_prompt_is_computed_once():
    shared = tuple(range(320))
    scripts = [script(f"{n}", 350, 10, start=shared) for n in range(50)]
    alone = Simulator(limits(share_prefixes=False), CurveMachine(CURVE)).run(scripts)
    together = Simulator(limits(), CurveMachine(CURVE)).run(scripts)
    assert alone.cached == 0
    assert together.cached == 49 * 320
    assert together.seconds < alone.seconds / 3


def test_what_arrives_later_starts_later():
    scripts = [script("now", 20, 5), script("later", 20, 5, arrival=10.0)]
    result = Simulator(limits(), CurveMachine(CURVE)).run(scripts)
    assert result.ended["now"] < 1.0
    assert result.started["later"] == 10.0
    assert result.seconds < 11.0
