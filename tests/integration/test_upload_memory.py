"""Uploads are streamed: a file many times larger than the server's buffers leaves its memory flat."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.upload_memory import measure


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc, which only Linux has")
def test_an_upload_is_never_held_in_memory(database_url: str) -> None:
    found = measure(database_url, file_bytes=64_000_000)
    assert found.extra < 24_000_000, found
