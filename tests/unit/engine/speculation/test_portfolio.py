"""Which drafter drafts for which request: what pays, by what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.speculation.experience import PRICES
from engine.speculation.portfolio import Portfolio, earned


def tokens(*counts: float) -> Any:
    """So many tokens a step, whatever a draft's verification costs."""
    return np.repeat(np.array(counts)[:, None], len(PRICES), axis=1)


def test_the_portfolio_settles_on_what_pays() -> None:
    portfolio = Portfolio({"good": (), "bad": ()}, 4)
    slots, kinds = np.arange(4), ["a", "a", "b", "b"]
    for seconds in (9.0, 0.004, 0.004):  # the first pass does not count: it compiles
        portfolio.learn_seconds("good", 4, seconds)
        portfolio.learn_seconds("bad", 4, seconds)
    for _ in range(40):
        portfolio.learn("good", slots, kinds, tokens(*[4.0] * 4))
        portfolio.learn("bad", slots, kinds, tokens(*[0.1] * 4))
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0) == ["good"] * 4
    # A lookup that promises more, or a pass that costs more than it brings.
    assert portfolio.choose(slots, kinds, np.full(4, 6.0), 100.0, 0.0) == [None] * 4
    assert portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.0) == [None] * 4
    # A new request starts from its template's record.
    portfolio.enter(0)
    assert portfolio.choose(slots, kinds, np.array([1.0, 9.0, 9.0, 9.0]), 100.0, 0.0) == ["good", None, None, None]


def test_each_template_uses_what_was_best_for_it() -> None:
    portfolio = Portfolio({"code": (), "chat": ()}, 2)
    for _ in range(40):
        for kind, slot in (("code", 0), ("chat", 1)):
            portfolio.learn("code", np.array([slot]), [kind], tokens(5.0 if kind == "code" else 0.2))
            portfolio.learn("chat", np.array([slot]), [kind], tokens(0.2 if kind == "code" else 5.0))
    assert portfolio.choose(np.arange(2), ["code", "chat"], np.ones(2), 0.0, 0.0) == ["code", "chat"]


def test_the_better_of_two_that_pay_drafts_and_one_that_is_hardly_used_does_not_pay_its_fixed_cost() -> None:
    portfolio = Portfolio({"fair": (), "fine": ()}, 4)
    slots = np.arange(4)
    for _ in range(60):
        portfolio.learn("fair", slots, ["a", "a", "a", "b"], tokens(2.0, 2.0, 2.0, 4.0))
        portfolio.learn("fine", slots, ["a", "a", "a", "b"], tokens(3.0, 3.0, 3.0, 3.0))
    kinds: list[str | None] = ["a", "a", "a", "b"]
    assert portfolio.choose(slots, kinds, np.zeros(4), 0.0, 0.0) == ["fine", "fine", "fine", "fair"]
    for _ in range(60):
        for requests in (1, 4):
            portfolio.learn_seconds("fair", requests, 0.005)
            portfolio.learn_seconds("fine", requests, 0.005)
    # At 1000 tokens a second a pass costs 5 tokens, more than `fair` brings for its one request: `fine` takes that, too.
    assert portfolio.choose(slots, kinds, np.zeros(4), 1000.0, 0.0) == ["fine"] * 4


def test_tags_say_where_a_drafter_is_tried_first_and_measurement_decides() -> None:
    portfolio = Portfolio({"coder": ("code",)}, 2)
    slots = np.arange(2)
    assert portfolio.choose(slots, ["code", "chat"], np.ones(2), 0.0, 0.0) == ["coder", None]
    for _ in range(10):
        portfolio.learn("coder", slots, ["code", "chat"], tokens(0.1, 4.0))
    assert portfolio.choose(slots, ["code", "chat"], np.ones(2), 0.0, 0.0) == [None, "coder"]


def test_a_new_drafter_is_tried_on_few_requests_at_first() -> None:
    portfolio, slots, kinds = Portfolio({"new": ()}, 4), np.arange(4), ["a"] * 4
    for brought in (0.0, 9.0):
        names = portfolio.choose(slots, kinds, np.array([1.0, 0.0, 0.5, 1.0]), 100.0, 0.0)
        assert names == [None, "new", "new", None], "those to whom it promises most beyond the lookup"
        portfolio.learn("new", slots[1:3], kinds[:2], tokens(brought, brought))
    assert portfolio.choose(slots, kinds, np.ones(4), 100.0, 0.0) == ["new"] * 4


def test_in_a_crowd_a_new_drafter_is_tried_on_an_eighth() -> None:
    portfolio = Portfolio({"new": ()}, 64)
    names = portfolio.choose(np.arange(64), ["a"] * 64, np.linspace(1.0, 0.0, 64), 100.0, 0.0)
    assert names == [None] * 56 + ["new"] * 8


def test_a_drafter_is_worth_what_its_drafts_bring_beyond_the_price_of_verifying_them() -> None:
    survival = np.array([[0.9, 0.6, 0.3]])
    assert earned(survival, survival)[0] == pytest.approx([np.maximum(survival - price, 0.0).sum() for price in PRICES])
    # One that promises more than it keeps earns what it keeps.
    assert earned(np.array([[0.9, 0.9]]), np.array([[0.5, 0.0]]))[0, 2] == pytest.approx(0.5 - 2 * 0.2)
    portfolio, slots, kinds = Portfolio({"fair": ()}, 4), np.arange(4), ["a"] * 4
    for _ in range(40):
        portfolio.learn("fair", slots, kinds, earned(np.full((4, 1), 0.6), np.full((4, 1), 0.6)))
        portfolio.learn_seconds("fair", 4, 0.004)
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.3) == ["fair"] * 4
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.7) == [None] * 4
    # Full steps pass no verdict on it; in others it is tried more and more seldom, and let go of in the end.
    for _ in range(1000):
        portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.7)
    assert portfolio.let_go() == []
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.3) == ["fair"] * 4
    tried = [step for step in range(1, 500) if any(portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.3))]
    assert tried == [32, 64, 128, 256]
    for _ in range(20):
        portfolio.choose(slots, kinds, np.zeros(4), 1e5, 0.3)
    assert portfolio.let_go() == ["fair"]


def test_a_drafter_that_cannot_follow_a_text_is_not_chosen_for_it_and_attends_again_once_it_would_be() -> None:
    portfolio, slots, kinds = Portfolio({"good": ()}, 4), np.arange(4), ["a"] * 4
    some, nobody = {"good": np.array([False, True, True, False])}, {"good": np.zeros(4, bool)}
    for _ in range(40):
        portfolio.learn("good", slots, kinds, tokens(*[4.0] * 4))
        portfolio.learn_intake("good", 4, 4 * 0.0001)
    assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0, some) == [None, "good", "good", None]
    for _ in range(200):
        assert portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0, nobody) == [None] * 4
        portfolio.foresee(4, 100.0, {"good": 1.0})
        assert portfolio.attends("good")
    # A lookup that promises more: nobody wants it, and it looks up only before it is tried, where it can follow.
    attended, tried = [], []
    for step in range(1, 600):
        portfolio.foresee(4, 100.0, {"good": 1.0})
        follows = some if portfolio.attends("good") else nobody
        attended.append(portfolio.attends("good"))
        if "good" in (names := portfolio.choose(slots, kinds, np.full(4, 9.0), 100.0, 0.0, follows)):
            tried.append(step)
            assert names.count("good") == 1
            assert names[1:3].count("good") == 1
    assert 1 <= len(tried) <= 5
    assert sum(attended) < 250
    assert all(all(attended[max(step - 20, 0) : step]) for step in tried)
    # Then the lookup has nothing, and it would pay: it follows from that step on.
    portfolio.choose(slots, kinds, np.zeros(4), 100.0, 0.0, nobody)
    portfolio.foresee(4, 100.0, {"good": 1.0})
    assert portfolio.attends("good")
