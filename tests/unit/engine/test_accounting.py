"""Sharing out time, and predicting it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from engine.accounting import estimate, share_out
from engine.speculation.cost_model import CostModel, Load
from engine.types import TokenLedger


@example(10**13, [10**6])
@given(st.integers(0, 10**13), st.lists(st.integers(0, 10**6), min_size=1, max_size=300).filter(any))
def test_shares_sum_to_the_total_and_are_proportional(total: int, weights: list[int]) -> None:
    shares = share_out(total, np.array(weights))
    assert shares.sum() == total
    exact = total * np.array(weights, np.float64) / sum(weights)  # as integers the largest products do not fit 64 bits
    assert np.abs(shares - exact).max() <= 1.0 + 1e-3 * total / 10**13


def step(prefill: int, drafts: list[int], kv: int) -> SimpleNamespace:
    """A step of as many decoding requests as there are numbers of drafts, and one chunk of `prefill` prompt tokens."""
    lengths = [1 + count for count in drafts] + [prefill]
    chunks = [SimpleNamespace(sequence=SimpleNamespace(ledger=TokenLedger())) for _ in lengths]
    packed = SimpleNamespace(
        num_tokens=sum(lengths),
        query_start=np.cumsum([0, *lengths]),
        logit_rows=np.arange(sum(lengths) - prefill),
        kv_lengths=np.array([kv + length for length in lengths]),
    )
    drafted = [np.zeros(count, np.int64) for count in [*drafts, 0]]
    load = Load(sum(lengths), sum(lengths) - prefill, int(packed.kv_lengths.sum()), 0)
    return SimpleNamespace(chunks=chunks, num_decoding=len(drafts), drafts=drafted, step=packed, load=load)


def model(seconds_per_step: float, seconds_per_token: float) -> CostModel:
    cost = CostModel(64)
    cost.profile([(Load(n, n, n), seconds_per_step + seconds_per_token * n) for n in (1, 2, 4, 8, 16, 32, 64)])
    return cost


def test_where_steps_cost_the_same_at_any_size_every_accepted_draft_saves_a_step() -> None:
    work = step(0, [3, 3], kv=10)
    estimate(work, SimpleNamespace(accepted=np.array([3, 0, 0])), model(1.0, 0.0))
    first, second = (chunk.sequence.ledger for chunk in work.chunks[:2])
    assert (first.modelled_ns, second.modelled_ns) == (500_000_000, 500_000_000)
    assert (first.plain_ns, second.plain_ns) == (2_000_000_000, 500_000_000)


def test_where_every_token_costs_the_same_drafts_save_nothing() -> None:
    work = step(4, [3, 0], kv=10)
    estimate(work, SimpleNamespace(accepted=np.array([3, 0, 0])), model(0.0, 1e-3))
    first, second, prefill = (chunk.sequence.ledger for chunk in work.chunks)
    assert first.plain_ns == first.modelled_ns == 4_000_000
    assert second.plain_ns == second.modelled_ns == 1_000_000
    assert prefill == TokenLedger()
