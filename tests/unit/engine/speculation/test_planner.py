"""Planning: what is taken is always a prefix, pays by the cost model, and cannot favour what was drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.cost_model import CostModel, Load
from engine.speculation.planner import Offer, Planner, StepCost, early_stop, search, throughput, token_weights, top

FREE = StepCost(1.0, np.zeros(200))


def linear(price: float, size: int = 200) -> StepCost:
    return StepCost(1.0, price * np.arange(size))


def staircase(width: int, height: float, size: int = 200) -> StepCost:
    return StepCost(1.0, height * (np.arange(size) // width))


survivals = st.lists(st.lists(st.floats(0.01, 0.999), min_size=1, max_size=6), min_size=1, max_size=5).map(
    lambda rows: np.array([np.cumprod(row + [0.0] * (6 - len(row))) for row in rows])
)


@settings(max_examples=200, deadline=None)
@given(survivals, st.floats(0.0, 0.5), st.integers(0, 40))
def test_lengths_are_within_what_was_drafted_and_take_the_likeliest(survival: np.ndarray, price: float, capacity: int) -> None:
    offer = Offer(survival)
    for lengths in (search(offer, linear(price)), early_stop(offer, linear(price)), top(offer, capacity)):
        assert (lengths <= (survival > 0).sum(axis=1)).all()
        taken = [survival[row, : lengths[row]].min() for row in range(len(survival)) if lengths[row]]
        left = [survival[row, lengths[row]] for row in range(len(survival)) if lengths[row] < survival.shape[1]]
        assert min(taken, default=1.0) >= max(left, default=0.0)


@settings(max_examples=100, deadline=None)
@given(survivals, st.integers(1, 5), st.floats(0.0, 1.0))
def test_search_finds_the_best_of_all_choices(survival: np.ndarray, width: int, height: float) -> None:
    survival = survival[:3, :3]
    cost = staircase(width, height)
    rates = []
    for lengths in itertools.product(range(survival.shape[1] + 1), repeat=len(survival)):
        gained = sum(survival[row, :length].sum() for row, length in enumerate(lengths))
        rates.append((len(survival) + gained) / (1.0 + cost.extra[sum(lengths)]))
    lengths = search(Offer(survival), cost)
    gained = sum(survival[row, :length].sum() for row, length in enumerate(lengths))
    rate = (len(survival) + gained) / (1.0 + cost.extra[lengths.sum()])
    assert rate >= max(rates) / 1.02 - 1e-9  # what gains less than the margin is left alone


def test_nothing_is_drafted_where_a_token_costs_what_it_brings() -> None:
    survival = np.full((4, 3), 0.95).cumprod(axis=1)
    assert search(Offer(survival), linear(1.0 / 4)).sum() == 0


def test_everything_is_drafted_where_it_is_free() -> None:
    survival = np.full((4, 3), 0.3).cumprod(axis=1)
    assert search(Offer(survival), FREE).tolist() == [3, 3, 3, 3]


def test_early_stop_stays_below_a_riser_that_search_climbs() -> None:
    survival = np.full((1, 8), 0.99).cumprod(axis=1)
    cost = StepCost(1.0, np.array([0.0, *([1.1] * 16)]))
    assert early_stop(Offer(survival), cost).sum() == 0
    assert search(Offer(survival), cost).sum() == 8


def test_random_drafts_get_the_capacity_of_two_steps_before() -> None:
    planner = Planner()
    rich, poor = np.full((1, 4), 0.9).cumprod(axis=1), np.full((1, 4), 0.01).cumprod(axis=1)
    cost = linear(0.05)
    chosen = [int(planner.choose(survival, cost, random=True).sum()) for survival in (rich, poor, poor, rich, rich)]
    assert chosen == [0, 0, 4, 0, 0]


def frequencies(choose_after_seeing_the_draw: bool) -> float:
    """Share of token A from target (0.7, 0.3), drafter (0.5, 0.5), two drafts: the counter-example of the exactness rule.

    The second draft's survival depends on the first: sure after A, hopeless after B. A search over all survivals verifies
    only when A was drawn; algorithm 1 and a fixed capacity decide on the first draft before looking at the second's.
    """
    target, draft = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    first = np.minimum(target, draft).sum()
    total = 0.0
    for token in (0, 1):
        survival = np.array([[first, first * (0.98 if token == 0 else 0.02)]])
        # Two verified tokens cost as much as one; one alone does not pay.
        cost = StepCost(1.0, np.array([0.0, 0.85, 0.85]))
        lengths = search(Offer(survival), cost) if choose_after_seeing_the_draw else early_stop(Offer(survival), cost)
        if lengths[0] == 0:
            probability_of_a = target[0]
        else:
            accept = min(1.0, target[token] / draft[token])
            residual = np.maximum(target - draft, 0.0)
            residual = residual / residual.sum()
            probability_of_a = accept * (token == 0) + (1 - accept) * residual[0]
        total += draft[token] * probability_of_a
    return total


def test_a_search_that_sees_later_survivals_biases_random_drafts_and_early_stop_does_not() -> None:
    assert frequencies(choose_after_seeing_the_draw=True) == pytest.approx(0.85)
    assert frequencies(choose_after_seeing_the_draw=False) == pytest.approx(0.70)


def test_throughput_counts_every_request_once_without_drafts() -> None:
    assert throughput(np.array([0.5, 0.25]), 4, linear(0.1)).tolist() == pytest.approx([4.0, 4.5 / 1.1, 4.75 / 1.2])


def test_drafts_lengthen_as_the_batch_empties_and_there_are_none_where_none_could_pay() -> None:
    planner = Planner()
    depths = [int(planner.limits(np.ones(requests), linear(0.01), 32).max()) for requests in (64, 8, 3, 2, 1)]
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (16, 32)
    assert planner.limits(np.ones(1), linear(0.01), 8).tolist() == [8]
    assert planner.limits(np.ones(1), linear(1.0), 32).tolist() == [0]


def half_fixed(price: float) -> StepCost:
    return StepCost(1.0, price * np.arange(200), fixed=0.5)


def test_while_others_wait_every_token_is_worth_the_same() -> None:
    assert token_weights(None, 3, half_fixed(0.1)).tolist() == [1.0, 1.0, 1.0]
    assert token_weights(np.full(3, 40.0), 3, half_fixed(0.1)) == pytest.approx(np.ones(3))


def test_once_nobody_waits_what_counts_is_who_ends_last() -> None:
    """One has a hundred times as far to go: its tokens save whole steps, the others' only their own rows of later ones."""
    weights = token_weights(np.array([1000.0, 10.0, 10.0, 10.0]), 4, half_fixed(0.1))
    assert weights == pytest.approx([2.44, 0.52, 0.52, 0.52], abs=0.01)
    assert weights.mean() == pytest.approx(1.0)
    # At 0.15 of a step a draft costs more than the others' tokens are worth (0.5 of a quarter), and less than the last one's.
    assert Planner().limits(weights, half_fixed(0.15), 32).tolist() == [32, 0, 0, 0]
    survival = np.full((4, 2), 0.9).cumprod(axis=1)
    assert Planner().choose(survival * weights[:, None], half_fixed(0.15), random=False).tolist() == [2, 0, 0, 0]
    assert Planner().choose(survival, half_fixed(0.15), random=False).tolist() == [2, 2, 2, 2]


def test_the_part_of_a_step_that_every_step_takes_is_told_from_that_of_its_rows() -> None:
    model = CostModel(64)
    model.profile([(Load(n, n, n), 0.01 + 0.001 * n) for n in (1, 2, 4, 8, 16, 32, 64)])
    for count in (2, 8, 32):
        cost = StepCost.of(model, decoding=count, prefill=0, kv_tokens=count, drafts=4)
        assert cost.fixed == pytest.approx(0.01 / (0.01 + 0.001 * count), abs=0.03)
    assert StepCost.of(model, decoding=1, prefill=0, kv_tokens=1, drafts=4).fixed == 1.0
