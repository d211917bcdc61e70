"""Finding what the sequences of a step read in common."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference.shared_prefixes import MIN_ROWS_TIMES_TOKENS, find_segments

BLOCK = 16
LONG = MIN_ROWS_TIMES_TOKENS // BLOCK
"""Blocks that are worth a segment for any two rows."""


def tables_of(*rows: list[int]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows])


def find(tables: np.ndarray, visible: list[int], queries: int = 1) -> tuple[list[tuple[list[int], int, int]], list[int]]:
    segments, covered = find_segments(tables, np.array(visible), np.full(len(tables), queries), BLOCK)
    return sorted((sorted(segment.members.tolist()), segment.first, segment.end) for segment in segments), covered.tolist()


def test_two_documents_under_one_system_prompt() -> None:
    system, one, two = list(range(1, 1 + LONG)), list(range(1000, 1000 + LONG)), list(range(2000, 2000 + LONG))
    tables = tables_of(system + one + [9001], system + one + [9002], system + two + [9003], system + two + [9004], [9005])
    found, covered = find(tables, [2 * LONG] * 4 + [0])
    assert found == [([0, 1], LONG, 2 * LONG), ([0, 1, 2, 3], 0, LONG), ([2, 3], LONG, 2 * LONG)]
    assert covered == [2 * LONG] * 4 + [0]


def test_a_short_trunk_goes_along_with_its_long_branches() -> None:
    one, two = list(range(1000, 1000 + LONG)), list(range(2000, 2000 + LONG))
    tables = tables_of([7, *one, 1], [7, *one, 2], [7, *two, 3], [7, *two, 4])
    found, covered = find(tables, [LONG + 1] * 4)
    assert found == [([0, 1], 0, LONG + 1), ([2, 3], 0, LONG + 1)]
    assert covered == [LONG + 1] * 4


def test_nothing_worth_sharing() -> None:
    assert find(tables_of([1, 2, 3], [1, 2, 4]), [2, 2]) == ([], [0, 0])
    assert find(tables_of([1, 2, 3], [4, 5, 6]), [3, 3]) == ([], [0, 0])


def test_only_what_every_row_sees_in_full_is_shared() -> None:
    """A sequence that still computes the common prefix cannot share the part that it is just writing."""
    common = list(range(1, 1 + 3 * LONG))
    found, covered = find(tables_of(common, common, common), [3 * LONG, 3 * LONG, LONG])
    assert found == [([0, 1], LONG, 3 * LONG), ([0, 1, 2], 0, LONG)]
    assert covered == [3 * LONG, 3 * LONG, LONG]


ROWS = st.tuples(st.lists(st.integers(1, 2), min_size=6, max_size=6), st.integers(0, 6))


@given(st.lists(ROWS, min_size=1, max_size=8), st.integers(1, 200))
def test_segments_cover_a_gapless_start_of_equal_visible_blocks(rows: list[tuple[list[int], int]], queries: int) -> None:
    tables, visible = np.array([row for row, _ in rows]), np.array([seen for _, seen in rows])
    segments, covered = find_segments(tables, visible, np.full(len(rows), queries), BLOCK)
    seen: dict[int, list[int]] = {index: [] for index in range(len(rows))}
    for segment in segments:
        part = tables[segment.members, segment.first : segment.end]
        assert len(segment.members) >= 2
        assert (part == part[0]).all()
        assert (visible[segment.members] >= segment.end).all()
        for member in segment.members:
            seen[int(member)] += range(segment.first, segment.end)
    for index, columns in seen.items():
        assert sorted(columns) == list(range(covered[index]))
