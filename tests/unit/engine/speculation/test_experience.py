"""What earlier jobs taught of a drafter: kept and read again, light enough to be corrected, and worth a job's first steps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from engine.speculation.experience import PRICES, Experience, Mean, Seconds, load_class
from engine.speculation.portfolio import Portfolio

SLOTS, KINDS = np.arange(4), ["a"] * 4


def tokens(*counts: float) -> Any:
    """So many tokens a step, whatever a draft's verification costs."""
    return np.repeat(np.array(counts)[:, None], len(PRICES), axis=1)


def earlier_jobs(brought: float, *, seconds: float = 0.004, jobs: int = 4) -> Experience:
    """What is kept of a drafter that brought so many tokens a step, by passes of so many seconds, at 100 tokens a second without it."""
    past = Experience()
    for _ in range(jobs):
        portfolio = Portfolio({"neural": ()}, 4, {"neural": past})
        run(portfolio, 100, brought, seconds)
        past = Experience.from_json(portfolio.experience()["neural"].to_json())
    return past


def run(portfolio: Portfolio, steps: int, brought: float, seconds: float = 0.004, *, shown: float = 1.0) -> tuple[list[bool], list[int]]:
    """Whether the drafter was to follow the texts in each step, and for how many requests it drafted."""
    attended, drafted = [], []
    for _ in range(steps):
        portfolio.foresee(4, 100.0, {"neural": shown})
        attended.append(portfolio.attends("neural"))
        names = portfolio.choose(SLOTS, KINDS, np.full(4, 0.1), 100.0, 0.0)
        rows = np.array([row for row, name in enumerate(names) if name])
        drafted.append(len(rows))
        if len(rows):
            portfolio.learn("neural", SLOTS[rows], [KINDS[row] for row in rows], tokens(*[brought] * len(rows)))
            portfolio.learn_seconds("neural", len(rows), seconds)
        if attended[-1]:
            portfolio.learn_intake("neural", 8, 8 * 0.001)
    return attended, drafted


def test_what_is_kept_is_what_was_known() -> None:
    before = Experience()
    for step in range(1, 50):
        before.add_brought(PRICES[::-1] * step, step)
        before.add_income(3, 0.1 * step)
        before.drafting.learn(step % 8, 0.002 + 0.0005 * (step % 8))
        before.intake.learn(step % 5, 0.001 * (step % 5))
    after = Experience.from_json(before.to_json())
    assert after.brought.weight == pytest.approx(before.brought.weight)
    assert after.brought.total == pytest.approx(before.brought.total)
    assert float(after.income[load_class(4)].total) == pytest.approx(float(before.income[load_class(3)].total))
    assert (after.drafting.fixed, after.drafting.each) == pytest.approx((0.002, 0.0005), rel=0.01)
    assert (after.intake.fixed, after.intake.each) == pytest.approx((0.0, 0.001), abs=1e-5)
    assert Experience.from_json(Experience().to_json()).brought.weight == 0.0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: "",
        lambda told: "[1, 2]",
        lambda told: json.dumps({**told, "brought": told["brought"][1:]}),
        lambda told: json.dumps({**told, "brought": ["x"] * 12}),
        lambda told: json.dumps({**told, "brought": [float("nan")] * 12}),
        lambda told: json.dumps({**told, "brought": [*told["brought"][:-1], -1.0]}),
        lambda told: json.dumps({**told, "income": told["income"][1:]}),
        lambda told: json.dumps({**told, "income": 3}),
        lambda told: json.dumps({**told, "drafting": [-1.0] * 6}),
        lambda told: json.dumps({key: value for key, value in told.items() if key != "intake"}),
    ],
)
def test_anything_else_is_refused(spoil: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Experience.from_json(spoil(json.loads(earlier_jobs(1.0).to_json())))


def test_seconds_are_a_line_and_neither_the_first_nor_an_interrupted_time_is_on_it() -> None:
    seconds = Seconds()
    seconds.learn(8, 30.0)
    assert (seconds.fixed, seconds.each) == (0.0, 0.0)
    for count in (1, 8, 4, 2) * 20:
        seconds.learn(count, 0.003 + 0.001 * count)
    seconds.learn(1, 5.0)
    assert seconds.fixed + seconds.each == pytest.approx(0.004, rel=0.15)
    assert seconds.fixed + 8 * seconds.each == pytest.approx(0.011, rel=0.05)


def test_times_that_were_all_of_one_size_can_be_kept() -> None:
    seconds = Seconds()
    for _ in range(2000):
        seconds.learn(1, 0.004)
    before = Experience(drafting=seconds)
    after = Experience.from_json(before.to_json()).drafting
    assert after.fixed + after.each == pytest.approx(0.004, rel=0.01)


def test_a_light_copy_has_the_same_mean_and_gives_way_sooner() -> None:
    mean = Mean(np.full(3, 300.0), 100.0)
    light = mean.light(10.0)
    assert light.total / light.weight == pytest.approx(np.full(3, 3.0))
    for _ in range(10):
        light.add(np.ones(3), 1.0)
    assert light.total / light.weight == pytest.approx(np.full(3, 2.0))
    assert mean.weight == 100.0
    assert Mean(np.full(3, 4.0), 2.0).light(10.0).weight == 2.0


def test_a_drafter_that_paid_in_earlier_jobs_drafts_for_all_from_the_first_step() -> None:
    portfolio = Portfolio({"neural": ()}, 4, {"neural": earlier_jobs(3.0)})
    portfolio.foresee(4, 100.0, {"neural": 1.0})
    assert portfolio.attends("neural")
    assert portfolio.choose(SLOTS, KINDS, np.zeros(4), 100.0, 0.0) == ["neural"] * 4


def test_one_that_did_not_is_neither_tried_nor_shown_anything_for_long() -> None:
    """A new one is tried at once, and looks on for a while."""
    attended, drafted = run(Portfolio({"neural": ()}, 4), 100, 0.01)
    assert sum(drafted[:8]) >= 4
    assert sum(attended) > 20
    attended, drafted = run(Portfolio({"neural": ()}, 4, {"neural": earlier_jobs(0.01)}), 100, 0.01)
    assert sum(drafted) == sum(attended) == 0


@pytest.mark.parametrize(("before", "now"), [(0.01, 4.0), (4.0, 0.01)])
def test_another_kind_of_job_corrects_what_earlier_ones_taught(before: float, now: float) -> None:
    """Where the drafter is better than it was, by the usual probes; where it is worse, by its own drafts."""
    _, drafted = run(Portfolio({"neural": ()}, 4, {"neural": earlier_jobs(before)}), 600, now)
    if now > before:
        assert sum(drafted[:100]) == 0
        assert sum(drafted[-200:]) > 400
    else:
        assert drafted[0] == 4
        assert sum(drafted) < 200


def test_what_a_drafter_is_worth_must_pay_for_the_prompts_that_it_takes_in() -> None:
    """It earns two tokens a step, and each that it takes in costs a tenth of one: 30 of the prompt for each of the answer are too many."""
    past = earlier_jobs(2.4)
    portfolio = Portfolio({"neural": ()}, 4, {"neural": past})
    assert float(past.income[load_class(4)].total / past.income[load_class(4)].weight) == pytest.approx(2.0, rel=0.2)
    for shown, attends in ((1.0, True), (10.0, True), (30.0, False), (1.0, True)):
        portfolio.foresee(4, 100.0, {"neural": shown})
        assert portfolio.attends("neural") == attends
    # At a load that no job had, it looks on.
    portfolio.foresee(1, 100.0, {"neural": 30.0})
    assert portfolio.attends("neural")


def test_what_lasts_counts_requests_alike_however_long_the_drafter_kept_them() -> None:
    portfolio = Portfolio({"neural": ()}, 2)
    for steps, brought in ((200, 3.0), (20, 0.0), (20, 0.0)):
        portfolio.enter(1)
        for _ in range(steps):
            portfolio.learn("neural", np.array([1]), ["a"], tokens(brought))
    past = portfolio.experience()["neural"].brought
    assert past.weight == pytest.approx(24, rel=0.02)
    assert past.total / past.weight == pytest.approx(np.ones(len(PRICES)), rel=0.02)


def test_a_drafter_whose_weights_were_exchanged_is_not_remembered_under_its_name() -> None:
    portfolio = Portfolio({"neural": (), "other": ()}, 4, {"neural": earlier_jobs(2.0), "other": earlier_jobs(1.0)})
    assert set(portfolio.experience()) == {"neural", "other"}
    portfolio.forget("neural")
    assert set(portfolio.experience()) == {"other"}
    assert set(Portfolio({"new": ()}, 4).experience()) == set()
