"""The splitter: the same lines however the bytes are cut, and no more memory than a line may have."""

import tracemalloc
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from service.planning.splitter import BOM, LineSplitter, RawLine


def split(*chunks, max_line_bytes=1000):
    splitter = LineSplitter(max_line_bytes)
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return lines + list(splitter.finish())


def test_line_ends_and_numbers():
    assert split(b"ab\ncd\r\n\nlast") == [
        RawLine(1, 0, 2, b"ab"),
        RawLine(2, 3, 2, b"cd"),
        RawLine(3, 7, 0, b""),
        RawLine(4, 8, 4, b"last"),
    ]
    assert split(b"") == []
    assert split(b"x\n") == [RawLine(1, 0, 1, b"x")]


def test_only_the_first_bom_and_the_last_carriage_return_are_taken_away():
    assert split(BOM + b"a\r\r\n" + BOM + b"b") == [RawLine(1, 3, 2, b"a\r"), RawLine(2, 7, 4, BOM + b"b")]


def test_a_line_may_be_as_long_as_allowed_and_no_longer():
    fits, too_long = split(b"x" * 10 + b"\r\n" + b"y" * 11 + b"\n", max_line_bytes=10)
    assert fits.data == b"x" * 10
    assert too_long == RawLine(2, 12, 11, None)
    [first] = split(BOM + b"x" * 10 + b"\r\n", max_line_bytes=10)
    assert first == RawLine(1, 3, 10, b"x" * 10)


def test_a_long_line_is_counted_and_not_kept():
    splitter = LineSplitter(1000)
    chunk = b"z" * (1 << 20)
    tracemalloc.start()
    lines = [line for _ in range(200) for line in splitter.feed(chunk)]
    lines += splitter.feed(b"\nnext\n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == [RawLine(1, 0, 200 << 20, None), RawLine(2, (200 << 20) + 1, 4, b"next")]
    assert peak < 4 << 20


@given(
    data=st.lists(st.sampled_from([b"a", b"\n", b"\r", BOM, b"\xe2\x80\xa8", b"long" * 5])).map(b"".join), cuts=st.sets(st.integers(0, 80))
)
def test_cuts_do_not_matter(data, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    whole = split(data, max_line_bytes=12)
    assert split(*pieces, max_line_bytes=12) == whole
    for line in whole:
        piece = data[line.offset : line.offset + line.length]
        assert line.data in (None, piece)
        assert b"\n" not in piece
