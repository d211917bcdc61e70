"""Sharing out time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.accounting import share_out


@given(st.integers(0, 10**13), st.lists(st.integers(0, 10**6), min_size=1, max_size=300).filter(any))
def test_shares_sum_to_the_total_and_are_proportional(total: int, weights: list[int]) -> None:
    shares = share_out(total, np.array(weights))
    assert shares.sum() == total
    assert np.abs(shares - total * np.array(weights) / sum(weights)).max() <= 1.0 + 1e-3 * total / 10**13
