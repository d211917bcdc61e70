"""Longest-match lookup against a brute-force search."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafters.matching import MAX_MATCH, Match, MatchIndex


def brute_force(text: list[int], minimum: int) -> int:
    """Length of the longest suffix of `text` that also ends somewhere earlier."""
    best = 0
    for end in range(len(text)):
        length = 0
        while length < min(end, MAX_MATCH) and text[end - 1 - length] == text[-1 - length]:
            length += 1
        best = max(best, length)
    return best if best >= minimum else 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 3), st.integers(1, 7))
def test_finds_the_longest_earlier_occurrence(text: list[int], key_length: int, piece: int) -> None:
    index = MatchIndex(key_length, max_chain=1000)
    for start in range(0, len(text), piece):
        index.extend(text[start : start + piece])
        known = text[: start + piece]
        match = index.longest_of_self()
        want = brute_force(known, key_length)
        assert (match.length if match else 0) == want
        if match:
            assert known[match.end - match.length : match.end] == known[len(known) - match.length :]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=20))
def test_matches_never_run_across_texts(texts: list[list[int]], asked: list[int]) -> None:
    index = MatchIndex(3, max_chain=1000)
    for text in texts:
        index.extend(text)
        index.close_text()
    match = index.longest(asked)
    lengths = [
        length
        for text in texts
        for end in range(len(text) + 1)
        for length in range(3, min(end, len(asked)) + 1)
        if text[end - length : end] == asked[len(asked) - length :]
    ]
    assert (match.length if match else 0) == max(lengths, default=0)


def test_a_hint_keeps_a_match_that_the_chain_no_longer_reaches() -> None:
    rng = random.Random(0)
    unique = list(range(100, 120))
    noise = [value for _ in range(60) for value in (1, 2, rng.randrange(3, 50))]
    index = MatchIndex(2, max_chain=4)
    index.extend([*unique, 1, 2, 77, *noise, *unique])
    match = index.longest_of_self()
    assert match is not None
    index.extend([1, 2])
    without, with_hint = index.longest_of_self(), index.longest_of_self(Match(match.end + 2, 0))
    assert without is not None
    assert without.length < 22
    assert with_hint is not None
    assert with_hint.length == 22
    assert index.following(with_hint, 1) == [77]


def test_following_stops_at_the_end_of_a_text_and_repeating_goes_round() -> None:
    index = MatchIndex(2)
    index.extend([1, 2, 3, 4])
    index.close_text()
    assert index.following(Match(2, 2), 5) == [3, 4]
    loop = MatchIndex(2)
    loop.extend([9, 1, 2, 3, 1, 2, 3])
    match = loop.longest_of_self()
    assert match == Match(4, 3)
    assert loop.repeating(match, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_key_lengths_are_bounded() -> None:
    with pytest.raises(ValueError, match="key_length"):
        MatchIndex(4)
