"""Stores of batches: the jobs themselves, their lines, and the results of those."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from typing import Protocol

from service.domain.job import Batch
from service.domain.line import LineOutcome, PendingLine, Segment, StagedLine, StoredResult
from service.domain.usage import Usage, Work
from service.ports.page import Page


class BatchStore(Protocol):
    """Batches. `save` writes what `evolve` and `to` changed; counters move only through `count`."""

    def add(self, batch: Batch) -> None: ...
    def get(self, project_id: str, batch_id: str) -> Batch | None: ...
    def load(self, batch_id: str, *, lock: bool = False) -> Batch:
        """By id alone, for the control process and workers; `lock` takes the row FOR UPDATE. Raises NotFound."""
        ...

    def page(self, project_id: str, *, after: str | None, limit: int) -> Page[Batch]: ...
    def save(self, batch: Batch) -> None: ...
    def count(self, batch_id: str, *, completed: int, failed: int, usage: Usage) -> int:
        """Adds to the counters and returns the new commit number (locks the row until the transaction ends)."""
        ...

    def overdue(self, limit: int) -> Sequence[str]:
        """Ids of open batches past their expiry, by database time."""
        ...


class RequestMemory(Protocol):
    """Creates that were answered before: what makes POST /batches idempotent."""

    def lock(self, project_id: str, digest: bytes) -> None:
        """Serialises creates of the same project and body until the transaction ends (advisory lock)."""
        ...

    def by_key(self, project_id: str, idempotency_key: str) -> tuple[bytes, str] | None:
        """(request digest, batch id) of an earlier create under this key."""
        ...

    def remember(self, project_id: str, idempotency_key: str, digest: bytes, batch_id: str) -> None: ...
    def recent_twin(self, project_id: str, api_key_id: str | None, digest: bytes, within: timedelta) -> str | None:
        """The newest batch created from the same body with the same API key."""
        ...

    def writer_of(self, output_uri: str) -> str | None:
        """The open batch, of any project, that will write there."""
        ...


class LineStore(Protocol):
    """The lines of a batch, from staging to attempts."""

    def stage(self, batch_id: str, lines: Sequence[StagedLine]) -> None: ...
    def clear(self, batch_id: str) -> None:
        """Forgets a half-done validation: lines, groups and their rejected results."""
        ...

    def duplicates(self, batch_id: str) -> Iterator[tuple[int, int, str]]:
        """(line, first line with the same custom_id, custom_id), ascending; found by the database, so memory stays flat."""
        ...

    def for_grouping(self, batch_id: str) -> Iterator[StagedLine]:
        """Lines without a result, ordered by model, prefix_key, longest expected first, line number."""
        ...

    def pending(self, group_ids: Collection[int]) -> Sequence[PendingLine]:
        """Lines of these groups that have no result, ordered by group and line."""
        ...

    def admit(self, keys: Collection[tuple[str, int]]) -> None:
        """Counts an attempt: these lines are about to enter the engine, and are suspects if it dies."""
        ...

    def acquit(self, keys: Collection[tuple[str, int]]) -> None:
        """Takes the attempt back: the worker gave these lines up in good order."""
        ...


class ResultStore(Protocol):
    """Delivered lines: insert-only, primary key (batch_id, line_no)."""

    def add(self, segment: Segment, outcomes: Sequence[tuple[LineOutcome, int, int]], commit_no: int) -> set[int]:
        """Records a segment and its lines (outcome, offset, length).

        Returns the line numbers that were new; a line that already has a result is left as it is.
        """
        ...

    def existing(self, batch_id: str, line_nos: Collection[int]) -> set[int]: ...
    def after(self, batch_id: str, commit_no: int, limit: int) -> Sequence[StoredResult]:
        """Results committed after this cursor, whole commits only, in (commit_no, line_no) order."""
        ...

    def in_order(self, batch_id: str) -> Iterator[tuple[int, str | None, StoredResult | None]]:
        """Every line of the batch in input order with its result, if any; streamed."""
        ...

    def segments(self, batch_id: str) -> Sequence[Segment]: ...
    def work(self, batch_id: str) -> Work:
        """Sum of the token ledgers of the delivered lines."""
        ...

    def unfinished(self, batch_id: str) -> Iterator[tuple[int, int, int]]:
        """(line, offset, length) of the lines that are not in the output file: what a retry sends again."""
        ...
