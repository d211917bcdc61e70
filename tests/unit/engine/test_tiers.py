"""Tiers, padding and what fills it, without a device."""

from __future__ import annotations

import numpy as np
import pytest

from engine.runner import PackedStep
from engine.tiers import Tier, Tiers, fill, pad


def test_a_tier_is_the_smallest_that_holds_tokens_and_sequences() -> None:
    tiers = Tiers(512, 256)
    for tokens in range(1, 513):
        for sequences in (1, 2, 3, 7, 8, 9, 200, 256):
            tier = tiers.of(tokens, sequences)
            assert tier is not None
            assert tier.tokens >= tokens
            assert tier.sequences >= sequences
            assert 3 * (tier.tokens - tokens) <= tier.tokens, "more than a third is padding"
            assert all(smaller < tokens for smaller in tiers.tokens if smaller < tier.tokens)
    assert tiers.of(513, 1) is None
    assert tiers.of(1, 257) is None


def test_equal_tokens_of_other_sequences_are_another_tier() -> None:
    tiers = Tiers(512, 256)
    assert tiers.of(64, 64) != tiers.of(64, 8)


def test_odd_limits_are_tiers_themselves() -> None:
    tiers = Tiers(100, 7)
    assert tiers.of(99, 7) == Tier(100, 7)
    assert tiers.of(97, 5) == Tier(100, 7)
    assert tiers.spare(97, 5) == 3
    assert tiers.spare(101, 5) == 0


@pytest.mark.parametrize("spare", [0, 1, 3, 100])
def test_spare_rows_go_to_the_shortest_that_have_drafts_left(spare: int) -> None:
    chosen, drafted = np.array([0, 2, 5, 1]), np.array([0, 6, 5, 3])
    filled = fill(chosen, drafted, spare)
    assert filled.sum() == chosen.sum() + min(spare, 6)
    assert (filled >= chosen).all()
    assert (filled <= drafted).all()
    if spare == 3:
        assert filled.tolist() == [0, 3, 5, 3]
    assert chosen.tolist() == [0, 2, 5, 1], "the plan itself is left alone"


def test_padding_is_a_sequence_of_its_own_in_block_0() -> None:
    step = PackedStep(
        token_ids=np.array([5, 6, 7]),
        positions=np.array([9, 10, 0]),
        slots=np.array([41, 42, 80]),
        tables=np.array([[3, 5, 10], [20, 0, 0]], np.int32),
        query_start=np.array([0, 2, 3], np.int32),
        kv_lengths=np.array([11, 1], np.int32),
        logit_rows=np.array([1, 2]),
        row_starts=np.array([0, 1]),
        row_counts=np.array([1, 1]),
        shared_prefix_blocks=0,
    )
    padded = pad(step, Tier(8, 4), rows=4, width=6)
    assert padded.token_ids.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert padded.positions.tolist() == [9, 10, 0, 0, 1, 2, 3, 4]
    assert padded.slots.tolist() == [41, 42, 80, 0, 0, 0, 0, 0]
    assert padded.query_start.tolist() == [0, 2, 3, 3, 3, 8]
    assert padded.kv_lengths.tolist() == [11, 1, 0, 0, 5]
    assert padded.tables.shape == (5, 6)
    assert padded.tables[0].tolist() == [3, 5, 10, 0, 0, 0]
    assert not padded.tables[2:].any()
    assert padded.logit_rows.tolist() == [1, 2, 0, 0]
