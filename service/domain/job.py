"""A batch, its states, and the one table of moves between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

from service.domain.usage import Usage
from service.errors import Conflict


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]


_S = BatchStatus
TRANSITIONS: Mapping[BatchStatus, frozenset[BatchStatus]] = MappingProxyType(
    {
        _S.VALIDATING: frozenset({_S.IN_PROGRESS, _S.FINALIZING, _S.FAILED, _S.CANCELLING}),
        _S.IN_PROGRESS: frozenset({_S.FINALIZING, _S.CANCELLING}),
        # What a finalizing batch becomes was decided when it entered: Batch.outcome.
        # It fails only where its results cannot be written to its output_uri; they are still to be had as files.
        _S.FINALIZING: frozenset({_S.COMPLETED, _S.EXPIRED, _S.FAILED}),
        _S.CANCELLING: frozenset({_S.CANCELLED}),
        _S.FAILED: frozenset(),
        _S.COMPLETED: frozenset(),
        _S.EXPIRED: frozenset(),
        _S.CANCELLED: frozenset(),
    }
)


class OnInvalidLine(StrEnum):
    """`fail`: one bad line fails the batch (OpenAI's way). `skip`: bad lines go to the error file, the rest runs."""

    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class InputError:
    """Why an input was refused: an entry of the batch's `errors.data`. `line` counts from 1; None means the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A job. Times are database time, UTC. Money is in ledger units (see billing.price_book)."""

    id: str
    project_id: str
    endpoint: str
    completion_window: str
    created_at: datetime
    expires_at: datetime
    price_version: int
    status: BatchStatus = BatchStatus.VALIDATING
    api_key_id: str | None = None
    input_file_id: str | None = None
    input_uri: str | None = None
    """`s3://bucket/key`; `input_file_id` is then our copy of it, once validated."""
    input_etag: str | None = None
    """The version of the object that was read and copied."""
    input_changed: bool | None = None
    """Whether the object is another one by the end of the batch; None: not looked at yet, or not known."""
    output_uri: str | None = None
    """`s3://bucket/folder`, no slash at its end."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    on_invalid_line: OnInvalidLine = OnInvalidLine.FAIL
    drafter: str = "auto"
    max_cost: int | None = None
    parent_batch_id: str | None = None
    output_expires_after: int | None = None
    """Seconds after creation until the output files expire; None: never."""
    request_digest: bytes | None = None
    """SHA-256 of the canonical create body: tells the SDK's blind repeats from deliberate twins."""
    model: str | None = None
    """The model of the first line, once validated."""
    outcome: BatchStatus | None = None
    """What a finalizing batch will become: completed or expired."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)
    errors: tuple[InputError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    commit_no: int = 0
    """Raised inside every commit of results: the cursor of `GET /results`."""
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None

    def evolve(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def to(self, status: BatchStatus, at: datetime, **changes: Any) -> Self:
        """The batch in its next state, with that state's timestamp set.

        Raises:
            Conflict: the table has no such move.
        """
        if status not in TRANSITIONS[self.status]:
            raise Conflict(f"Batch {self.id} is {self.status.value} and cannot become {status.value}.")
        return self.evolve(status=status, **{f"{status.value}_at": at}, **changes)
