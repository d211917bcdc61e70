"""Results while a batch runs: the lines delivered so far, in commit order, read straight from the committed segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

from service.domain.line import StoredResult
from service.errors import BlobCorrupt
from service.ports import BlobStore, Database
from service.usecases.submit import owned_batch


@dataclass(frozen=True, slots=True)
class ResultPage:
    """Whole commits after a cursor. `cursor` continues behind them; it equals the one asked for where nothing is new."""

    results: Sequence[StoredResult]
    cursor: int
    has_more: bool


def results_after(database: Database, project_id: str, batch_id: str, *, cursor: int, limit: int) -> ResultPage:
    """About `limit` results: a commit is never torn apart. Raises NotFound as `owned_batch` does."""
    with database.begin() as uow:
        owned_batch(uow, project_id, batch_id)
        results = uow.results.after(batch_id, cursor, limit)
        if not results:
            return ResultPage((), cursor, False)
        last = results[-1].commit_no
        return ResultPage(results, last, bool(uow.results.after(batch_id, last, 1)))


def read_lines(blobs: BlobStore, results: Sequence[StoredResult]) -> Iterator[bytes]:
    """The lines of these results, newline included, one in memory at a time.

    Neighbours in a segment are read through one stream, so that a page costs a request to the store for each commit, not for
    each line. Raises BlobCorrupt where a segment ends early.
    """
    for run in _runs(results):
        length = sum(result.length for result in run)
        with closing(blobs.open(run[0].segment_key, start=run[0].offset, length=length)) as stream:
            for result in run:
                line = _read_exactly(stream, result.length)
                if len(line) != result.length:
                    raise BlobCorrupt(f"Segment {result.segment_key} ends before line {result.line_no}.")
                yield line


def _runs(results: Sequence[StoredResult]) -> Iterator[list[StoredResult]]:
    """Stretches that lie back to back in one segment."""
    run: list[StoredResult] = []
    for result in results:
        if run and (result.segment_key != run[-1].segment_key or result.offset != run[-1].offset + run[-1].length):
            yield run
            run = []
        run.append(result)
    if run:
        yield run


def _read_exactly(stream: BinaryIO, length: int) -> bytes:
    """Streams over HTTP may answer with less than was asked for; fewer bytes only at the end."""
    parts: list[bytes] = []
    while length > 0 and (part := stream.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
