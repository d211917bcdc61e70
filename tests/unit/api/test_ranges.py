"""The Range header against a file of 100 bytes."""

from __future__ import annotations

import pytest

from service.api.ranges import RangeNotSatisfiable, parse_range


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", (0, 10)),
        ("bytes=90-", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=95-1000", (95, 100)),
        ("BYTES=99-99", (99, 100)),
    ],
)
def test_a_range_is_cut_to_the_file(header: str, expected: tuple[int, int]) -> None:
    part = parse_range(header, 100)
    assert part is not None
    assert (part.start, part.stop) == expected


@pytest.mark.parametrize(
    "header", [None, "", "bytes=-", "bytes=9-3", "bytes=0-1,5-6", "lines=0-3", "bytes=a-b", "bytes=" + "9" * 4000 + "-"]
)
def test_what_is_no_single_range_means_the_whole_file(header: str | None) -> None:
    assert parse_range(header, 100) is None


@pytest.mark.parametrize(("header", "size"), [("bytes=100-", 100), ("bytes=-0", 100), ("bytes=0-", 0), ("bytes=-5", 0)])
def test_a_range_outside_the_file_is_refused(header: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as refusal:
        parse_range(header, size)
    assert (refusal.value.status, refusal.value.size) == (416, size)
