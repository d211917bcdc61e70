"""What every object store promises: in memory, in a directory, in a bucket over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading

import pytest

from service.errors import BlobCorrupt, BlobNotFound, InvalidRequest
from service.ports import BlobStore

PART = 5 << 20
"""What the bucket's store is set to send at a time: the smallest that S3 allows."""


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def read(blobs: BlobStore, key: str, **where: int) -> bytes:
    with blobs.open(key, **where) as stream:
        return stream.read()


@pytest.mark.parametrize("size", [0, 1, 1000, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 7])
def test_what_goes_in_comes_out(blobs: BlobStore, size: int) -> None:
    data = content(size)
    with blobs.writer("in/x") as writer:
        for start in range(0, size, 777_777):
            writer.write(memoryview(data)[start : start + 777_777])
        info = writer.commit()
    assert (info.key, info.bytes, info.sha256) == ("in/x", size, hashlib.sha256(data).hexdigest())
    assert read(blobs, "in/x") == data
    found = blobs.head("in/x")
    assert found is not None
    assert (found.key, found.bytes) == ("in/x", size)
    assert found.sha256 in (None, info.sha256)


def test_one_write_may_be_larger_than_a_part(blobs: BlobStore) -> None:
    data = content(2 * PART + 3)
    assert blobs.put("big", data).bytes == len(data)
    assert read(blobs, "big") == data


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, None), (0, 10), (5, 10), (5, None), (90, 10), (90, 100), (99, 1), (100, None), (100, 5), (1000, None), (7, 0), (100, 0)],
)
def test_ranges(blobs: BlobStore, start: int, length: int | None) -> None:
    data = content(100)
    blobs.put("ranges", data)
    with blobs.open("ranges", start=start, length=length) as stream:
        assert stream.read() == data[start : None if length is None else start + length]
        assert stream.read() == b""


def test_streams_are_read_piecewise_and_by_lines(blobs: BlobStore) -> None:
    lines = [b"first\n", b"\xff\x00second\n", b"last, without an end"]
    blobs.put("lines", b"".join(lines))
    with blobs.open("lines") as stream:
        assert (stream.read(3), stream.readline(), list(stream)) == (b"fir", b"st\n", lines[1:])


@pytest.mark.parametrize("where", [{}, {"start": 3}, {"start": 3, "length": 2}, {"length": 0}])
def test_nothing_under_a_key(blobs: BlobStore, where: dict[str, int]) -> None:
    blobs.put("there/a", b"a")
    for key in ("missing", "there", "there/a/b"):
        assert blobs.head(key) is None
        with pytest.raises(BlobNotFound):
            blobs.open(key, **where)


def test_nothing_shows_before_commit_and_nothing_stays_without_it(blobs: BlobStore) -> None:
    for size in (10, PART + 10):
        with blobs.writer("half") as writer:
            writer.write(content(size))
            assert blobs.head("half") is None
        with contextlib.suppress(KeyError), blobs.writer("half") as writer:
            writer.write(content(size))
            raise KeyError
    assert blobs.head("half") is None
    assert list(blobs.list("")) == []


def test_a_put_replaces_the_whole_object(blobs: BlobStore) -> None:
    blobs.put("twice", b"a longer first version")
    with blobs.open("twice") as before:
        blobs.put("twice", b"second")
        assert before.read() in (b"a longer first version", b"second")
    assert read(blobs, "twice") == b"second"


def test_delete_is_idempotent_and_leaves_neighbours(blobs: BlobStore) -> None:
    blobs.put("d/a", b"a")
    blobs.put("d/b", b"b")
    for _ in range(2):
        blobs.delete("d/a")
    blobs.delete("never/was")
    assert [info.key for info in blobs.list("")] == ["d/b"]


def test_list_goes_by_prefix(blobs: BlobStore) -> None:
    for key in ("s/b1/x", "s/b1/y", "s/b10/z", "o/b1/x"):
        blobs.put(key, key.encode())
    assert sorted(info.key for info in blobs.list("s/b1")) == ["s/b1/x", "s/b1/y", "s/b10/z"]
    assert {info.key: info.bytes for info in blobs.list("s/b1/")} == {"s/b1/x": 6, "s/b1/y": 6}
    assert list(blobs.list("nothing/")) == []


def test_list_is_in_key_order(blobs: BlobStore) -> None:
    keys = ["a b/x", "a-b", "a.b/c", "a/b/c", "a/b.c", "a/bb", "ab", "b/\u00e9", "b/z", "b/\U0001f600"]
    for key in keys:
        blobs.put(key, b"")
    assert [info.key for info in blobs.list("")] == sorted(keys, key=str.encode)


@pytest.mark.parametrize("key", ["space in name.jsonl", "plus+percent%41&amp;=?#", "ünïcödé/日本.jsonl", "a" * 255, "..dots../.hidden"])
def test_unusual_keys(blobs: BlobStore, key: str) -> None:
    blobs.put(key, b"x")
    assert read(blobs, key) == b"x"
    assert [info.key for info in blobs.list("")] == [key]
    blobs.delete(key)
    assert blobs.head(key) is None


REFUSED = ["", "/", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", ".", "a/./b", "a\0b", "a\nb", "a\\b", "x" * 256, "x/" * 600]


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_are_refused(blobs: BlobStore, key: str) -> None:
    for use in (blobs.head, blobs.open, blobs.delete, blobs.writer):
        with pytest.raises(InvalidRequest):
            use(key)


def test_racing_writers_of_one_key_leave_one_whole_object(blobs: BlobStore) -> None:
    """Who was overtaken may be told so. (The service never puts two objects under one key.)"""
    versions = [bytes([number]) * 100_000 for number in range(6)]
    stored: list[bytes] = []

    def put(version: bytes) -> None:
        with contextlib.suppress(BlobCorrupt):
            blobs.put("race/key", version)
            stored.append(version)

    threads = [threading.Thread(target=put, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(blobs, "race/key") in stored


def test_puts_and_deletes_of_neighbours_do_not_disturb_each_other(blobs: BlobStore) -> None:
    """A directory store tidies empty folders away while others put into them."""

    def come_and_go(name: str) -> None:
        for _ in range(15):
            blobs.put(f"shared/folder/{name}", b"x")
            blobs.delete(f"shared/folder/{name}")
        blobs.put(f"shared/folder/{name}", b"stays")

    threads = [threading.Thread(target=come_and_go, args=(str(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(info.key for info in blobs.list("shared/")) == [f"shared/folder/{number}" for number in range(3)]


def test_probe_tells_what_the_store_is_and_leaves_nothing(blobs: BlobStore) -> None:
    facts = blobs.probe()
    assert facts["store"] in ("memory", "directory", "s3")
    assert (facts["put"], facts["read"], facts["delete"]) == ("yes", "yes", "yes")
    assert list(blobs.list("")) == []
