"""Input objects on scratch disk: fetched once, checked, read by range, dropped when there are too many."""

import hashlib

import pytest

from service.adapters.memory import MemoryBlobStore
from service.errors import BlobCorrupt, BlobNotFound, Unavailable
from service.usecases.inputs import InputFiles


class Counting(MemoryBlobStore):
    """Notes which objects were opened."""

    def __init__(self):
        super().__init__()
        self.opened = []

    def open(self, key, **where):
        self.opened.append(key)
        return super().open(key, **where)


@pytest.fixture
def blobs():
    store = Counting()
    for name in "abc":
        store.put(name, name.encode() * 100)
    return store


def sha(name):
    return hashlib.sha256(name.encode() * 100).hexdigest()


def test_an_object_is_fetched_once_however_often_it_is_read(blobs):
    with InputFiles(blobs) as inputs:
        assert [inputs.read("a", sha("a"), offset, 3) for offset in (0, 97, 50)] == [b"aaa"] * 3
    assert blobs.opened == ["a"]


def test_the_one_that_was_not_read_for_longest_makes_room(blobs):
    with InputFiles(blobs, keep_bytes=200) as inputs:
        for name in ("a", "b", "a", "c", "a", "b"):
            inputs.read(name, sha(name), 0, 1)
    assert blobs.opened == ["a", "b", "c", "b"]


def test_an_object_larger_than_the_space_is_still_read(blobs):
    with InputFiles(blobs, keep_bytes=10) as inputs:
        assert inputs.read("a", sha("a"), 0, 100) == b"a" * 100


def test_other_bytes_than_were_recorded_are_refused(blobs):
    with InputFiles(blobs) as inputs:
        with pytest.raises(BlobCorrupt):
            inputs.read("a", sha("b"), 0, 1)
        with pytest.raises(BlobCorrupt, match="ends before"):
            inputs.read("a", sha("a"), 99, 2)
        with pytest.raises(BlobNotFound):
            inputs.read("missing", None, 0, 1)


def test_an_outage_leaves_no_half_file_behind(blobs):
    class Failing(Counting):
        def open(self, key, **where):
            stream = super().open(key, **where)
            if len(self.opened) == 1:
                stream.read = lambda size: (_ for _ in ()).throw(Unavailable("gone"))
            return stream

    failing = Failing()
    failing._objects.update(blobs._objects)
    with InputFiles(failing) as inputs:
        with pytest.raises(Unavailable):
            inputs.read("a", sha("a"), 0, 1)
        assert inputs.read("a", sha("a"), 0, 1) == b"a"
