"""The real planner in virtual time on recorded step curves: it must not lose to plain decoding, nor to a fixed draft length."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.drafters.base import DraftBatch, Drafts
from engine.lab.machine import CurveMachine
from engine.lab.simulator import Limits, Script, Simulation, Simulator
from engine.lab.stand_in import Manner, StandIn
from engine.lab.supply import Clock, Price, ReplaySupply
from engine.speculation.cost_model import CostModel
from engine.speculation.speculator import Speculator
from engine.types import Request, SamplingParams

PREPACKED = {1: 0.016, 2: 0.017, 4: 0.021, 8: 0.031, 16: 0.058, 32: 0.079, 64: 0.140, 128: 0.259, 256: 0.570}
EAGER = {1: 0.052, 8: 0.095, 32: 0.163, 64: 0.254, 128: 0.405, 256: 0.629}
FLAT = {1: 0.020, 256: 0.022}
CURVES = {"prepacked": PREPACKED, "eager": EAGER}
MOST = 8
_LINES = {1: 16, 8: 48, 64: 64}
"""Requests of a job, by how many run together: with fewer, which policy meets the better luck decides, and the trial of the drafter is much
of the job."""


def scripts(count: int) -> list[Script]:
    rng = random.Random(count)
    return [
        Script(
            Request(str(n), tuple(rng.randrange(1000) for _ in range(24)), SamplingParams(max_tokens=96, temperature=0.0), drafter="model"),
            tuple(rng.randrange(1000) for _ in range(rng.randint(32, 64))),
        )
        for n in range(count)
    ]


def supply(jobs: list[Script], clock: Clock, rate: float) -> ReplaySupply:
    """A drafter that takes no time, whose drafts stand with a chance of `rate` each."""
    answers = {job.request.id: np.array(job.output) for job in jobs}
    manner = Manner.by_depth(np.full(MOST, rate))
    return ReplaySupply(("suffix",), answers, MOST, clock, {"model": manner}, {"model": Price(0.0, 0.0)})


def simulate(count: int, curve: dict[int, float], rate: float, *, fixed: int | None = None, plain: bool = False) -> Simulation:
    jobs, machine = scripts(_LINES[count]), CurveMachine(curve)
    limits = Limits(max_sequences=count, max_step_tokens=max(512, count), num_blocks=4096)
    speculator = None
    if not plain:
        cost = CostModel(512)
        cost.profile(machine.profile([1, 2, 4, 8, 16, 32, 64, 128, 256, 512]))
        clock = Clock()
        speculator = Speculator(MOST, count, cost, supply(jobs, clock, rate), fixed_drafts=fixed, clock=clock)
    return Simulator(limits, machine, speculator).run(jobs)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("count", "rate"), [(1, 0.15), (1, 0.6), (8, 0.15), (8, 0.9), (64, 0.15), (64, 0.6)])
def test_the_planner_never_loses(count, rate, curve):
    plain = simulate(count, CURVES[curve], rate, plain=True).tokens_per_second
    fixed = simulate(count, CURVES[curve], rate, fixed=8).tokens_per_second
    planned = simulate(count, CURVES[curve], rate).tokens_per_second
    assert planned >= 0.98 * plain
    assert planned >= 0.98 * fixed


def test_speculation_pays_where_steps_are_flat_and_hurts_where_they_are_not():
    """The simulator tells policies apart: otherwise the test above would hold of anything."""
    assert simulate(8, FLAT, 0.9, fixed=8).seconds < 0.3 * simulate(8, FLAT, 0.9, plain=True).seconds
    assert simulate(64, PREPACKED, 0.15, fixed=8).seconds > 2 * simulate(64, PREPACKED, 0.15, plain=True).seconds


def test_a_fixed_length_is_verified_whatever_it_costs():
    result = simulate(64, PREPACKED, 0.15, fixed=4)
    assert result.verified == result.drafted
    assert result.verified > 2.5 * result.generated


def test_a_fixed_length_never_overfills_a_step():
    jobs = scripts(6)
    cost = CostModel(16)
    cost.profile(CurveMachine(FLAT).profile([1, 4, 16]))
    loads = []
    clock = Clock()
    speculator = Speculator(MOST, 6, cost, supply(jobs, clock, 1.0), fixed_drafts=8, clock=clock)
    limits = Limits(max_sequences=6, max_step_tokens=16, num_blocks=400)
    Simulator(limits, CurveMachine(FLAT), speculator, watch=lambda step, _: loads.append(step.load.tokens)).run(jobs)
    assert max(loads) == 16


def test_a_stand_in_is_as_often_right_as_it_was_told():
    answers = {str(n): np.arange(400) for n in range(8)}
    rates = np.array([0.9, 0.5])
    drafter = StandIn("stand-in", answers, Manner.by_depth(rates), 2)
    job = Simulator(Limits(max_sequences=1, max_step_tokens=8, num_blocks=64), CurveMachine(FLAT))
    right = np.zeros(2)
    total = 0
    for name in answers:
        sequence = job.scheduler.add(Request(name, (1, 2, 3), SamplingParams(max_tokens=400, temperature=0.0)))
        for position in range(398):
            drafts: Drafts = drafter.propose(DraftBatch([sequence], np.array([2]), position))
            right += drafts.token_ids[0] == [position, position + 1]
            total += 1
            sequence.append(np.array([position]))
    assert right / total == pytest.approx(rates, abs=0.03)
