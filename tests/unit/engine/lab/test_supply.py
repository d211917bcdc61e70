"""What a replay makes of the drafters of its trace: how sure they were, how often they stood, what they took, what was known of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.drafters.base import DraftBatch
from engine.lab.line import fit_line
from engine.lab.machine import CurveMachine
from engine.lab.simulator import Limits, Simulator
from engine.lab.stand_in import Manner, StandIn
from engine.lab.supply import Clock, Price, ReplaySupply, Told
from engine.lab.trace import EndRecord, RequestRecord, StepRecord, Trace
from engine.speculation.experience import PRICES, Experience
from engine.types import Request, SamplingParams
from tests.unit.engine.lab.test_trace import engine_record

FREE = CurveMachine({1: 0.0})
SURE, UNSURE = (0.9, 0.81, 0.729), (0.3, 0.09)


def step(**fields) -> StepRecord:
    return StepRecord(0.0, 8, 8, 80, 80, 4, 4, 0.02, 0.0, None, **fields)


def drafted(count: int) -> list[StepRecord]:
    """Every step a lookup's block, a sure one of `neural` and an unsure one, of which every second stands."""
    return [
        step(
            drafted=(4, 3, 2),
            chosen=(1, 3, 1),
            accepted=(0, 3, number % 2),
            survival=((0.1, 0.05, 0.02, 0.01), SURE, UNSURE),
            groups=(("suffix", (0,)), ("neural", (1, 2))),
            passes=(("suffix", 3, 1e-4), ("neural", 2, 0.005)),
        )
        for number in range(count)
    ]


def test_a_manner_is_of_one_drafter_and_its_rates_are_what_came_true() -> None:
    manner = Manner.of_steps(drafted(400), "neural")
    assert manner is not None
    sure, unsure = manner.blocks[:2]
    assert [len(sure), len(unsure)] == [3, 2]
    assert manner.rates[sure] == pytest.approx(np.ones(3), abs=0.01), "foretold 0.9, but all stood"
    assert manner.rates[unsure] == pytest.approx(np.full(2, 0.5), abs=0.02), "foretold 0.3, but every second stood"
    lookup = Manner.of_steps(drafted(400), "suffix")
    assert lookup is not None
    assert lookup.rates[lookup.blocks[0][0]] < 0.01
    assert Manner.of_steps(drafted(400), "another") is None


def test_a_stand_in_knows_which_of_its_blocks_are_sure() -> None:
    """It tells them apart by bins as the drafter did by its confidence, and longer blocks go on as they ended."""
    manner = Manner.of_steps(drafted(400), "neural")
    assert manner is not None
    answer = np.arange(600)
    stand_in = StandIn("neural", {"1": answer}, manner, 8)
    sequence = Simulator(Limits(max_sequences=1, max_step_tokens=8, num_blocks=64), FREE).scheduler.add(
        Request("1", (1, 2, 3), SamplingParams(max_tokens=600, temperature=0.0))
    )
    right: dict[int, list[bool]] = {}
    for position in range(590):
        drafts = stand_in.propose(DraftBatch([sequence], np.array([8]), position))
        assert drafts.lengths.tolist() == [8]
        assert (drafts.bins[0, 2:] == drafts.bins[0, 2]).all()
        right.setdefault(int(drafts.bins[0, 0]), []).append(bool(drafts.token_ids[0, 0] == position))
        sequence.append(np.array([position]))
    chances = sorted(np.mean(stood) for stood in right.values())
    assert chances == pytest.approx([0.5, 1.0], abs=0.1)
    assert all(len(stood) > 200 for stood in right.values()), "both kinds of blocks are drawn alike"


def test_passes_move_the_clock_by_what_they_took_in_the_trace() -> None:
    steps = [step(passes=(("neural", count, 0.002 + 0.001 * count), ("suffix", 4, 1e-4))) for count in (1, 2, 4, 8)]
    price = Price.of_steps(steps, "neural")
    assert price is not None
    assert (price.fixed, price.each) == pytest.approx((0.002, 0.001))
    assert Price.of_steps(steps, "another") is None
    assert Price.of_steps([step(groups=(("neural", (0,)),))], "neural") == Price(0.0, 0.0), "drafted on the device, inside the step"
    trace, clock = _trace(steps), Clock()
    supply = ReplaySupply.of(trace, Told({}), clock)
    sequence = Simulator(Limits(max_sequences=1, max_step_tokens=8, num_blocks=64), FREE).scheduler.add(trace.requests[0].request())
    for name, nanoseconds in (("neural", 3_000_000), ("suffix", 25_000)):
        before = clock()
        supply.create(name).propose(DraftBatch([sequence], np.array([4]), 0))
        assert clock() - before == nanoseconds


def test_of_a_drafter_that_did_not_draft_what_was_known_before_counts() -> None:
    known = Experience()
    for _ in range(20):
        known.add_brought(np.linspace(1.5, 0.0, len(PRICES)), 8)
        known.drafting.learn(2, 0.004)
        known.drafting.learn(4, 0.006)
    trace, clock = _trace([], {"neural": known.to_json()}), Clock()
    told = Told(trace.engine.experience)
    drafter = ReplaySupply.of(trace, told, clock).create("neural")
    assert drafter.prior == pytest.approx([0.6]), "of endless blocks one and a half drafts stand"
    sequence = Simulator(Limits(max_sequences=1, max_step_tokens=8, num_blocks=64), FREE).scheduler.add(trace.requests[0].request())
    drafter.propose(DraftBatch([sequence], np.array([4]), 0))
    assert clock() == pytest.approx(3_000_000, rel=0.01)
    recalled = told.recall("neural")
    assert recalled is not None
    assert recalled.brought.weight == pytest.approx(known.brought.weight)
    assert told.recall("another") is None


def test_a_line_is_never_negative_and_its_sum_is_right() -> None:
    counts = np.array([1.0, 2.0, 4.0])
    assert fit_line(counts, 0.5 + 0.25 * counts) == pytest.approx((0.5, 0.25))
    assert fit_line(counts, np.array([3.0, 2.0, 1.0])) == pytest.approx((2.0, 0.0))
    fixed, each = fit_line(counts, np.array([0.0, 1.0, 6.0]))
    assert (fixed, each) == pytest.approx((0.0, 1.0))
    assert fit_line(np.array([4.0, 4.0]), np.array([2.0, 4.0])) == pytest.approx((0.0, 0.75))
    assert fit_line(counts, np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 0.0])) == pytest.approx((0.0, 1.0))


def _trace(steps: list[StepRecord], experience: dict[str, str] | None = None) -> Trace:
    engine = replace(engine_record(), drafter="portfolio", members=("suffix", "neural"), max_draft_tokens=8, experience=experience or {})
    request = RequestRecord(1, 0.0, False, (1, 2, 3, 1, 2, 3, 1, 2), 32, None, 0, None, "auto", True)
    return Trace(engine, [request], steps, {1: EndRecord(1, 1.0, "stop", tuple(range(30)))})
