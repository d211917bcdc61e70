"""Lines of a job, the groups they are leased in, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from service.domain.usage import Usage, Work


@dataclass(frozen=True, slots=True)
class StagedLine:
    """A line that passed (or, with `error`, failed) the checks of the streaming pass.

    `line_no` counts from 1. Offset and length give its bytes in the input object, line end excluded.
    """

    line_no: int
    offset: int
    length: int
    custom_id: str | None
    model: str | None = None
    prefix_key: bytes = b""
    """Digests of growing prompt prefixes, concatenated: sorting by it puts lines that share a prefix side by side."""
    expected_tokens: int = 0
    """Rough size (prompt + max_tokens) that grouping and scheduling order by."""


class Outcome(StrEnum):
    """SUCCEEDED goes to the output file; the others go to the error file and are never billed."""

    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    """The endpoint answered 4xx."""
    FAILED = "failed"
    """Never executed, or execution broke: `response` is null and `error` says why."""


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """Lines that are leased and recovered together: one model, one batch."""

    model: str
    line_nos: tuple[int, ...]
    expected_tokens: int


@dataclass(frozen=True, slots=True)
class GroupLease:
    """A claim on a group. Whoever holds the highest `token` owns it; every write compares it under the row's lock."""

    group_id: int
    token: int
    batch_id: str
    project_id: str
    model: str
    endpoint: str
    priority: int
    expires_at: datetime
    """When the batch expires (database time)."""
    drafter: str
    price_version: int
    suspect: bool
    """Its line was in the engine when a worker died, more than once: run it alone."""
    input_key: str
    input_sha256: str | None
    task: str | None = None
    """Of the batch's metadata: what its lines are about, for drafters that were made for some tasks."""
    capped: bool = False
    """The batch has a `max_cost`: what a line may cost at worst is reserved before it runs."""


@dataclass(frozen=True, slots=True)
class PendingLine:
    """A line of a leased group that has no result yet."""

    batch_id: str
    line_no: int
    group_id: int
    custom_id: str
    offset: int
    length: int
    attempts: int


@dataclass(frozen=True, slots=True)
class LineWork:
    """What a runner is given: one request to answer."""

    batch_id: str
    line_no: int
    group_id: int
    custom_id: str
    model: str
    endpoint: str
    body: dict[str, Any]
    priority: int = 0
    deadline: float | None = None
    drafter: str = "auto"
    task: str | None = None
    """Lines of one task draft for each other, and a drafter's tags name tasks; None: lines whose prompts begin alike are one."""

    @property
    def key(self) -> tuple[str, int]:
        return self.batch_id, self.line_no


@dataclass(frozen=True, slots=True)
class LineOutcome:
    """What became of a line. `body` is the endpoint's answer (200 or 4xx), or None where it was never executed."""

    batch_id: str
    line_no: int
    group_id: int | None
    custom_id: str | None
    outcome: Outcome
    status_code: int | None = None
    body: dict[str, Any] | None = None
    error_code: str | None = None
    error_message: str | None = None
    usage: Usage = field(default_factory=Usage)
    work: Work = field(default_factory=Work)
    drafter: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.batch_id, self.line_no


@dataclass(frozen=True, slots=True)
class StoredResult:
    """Where a delivered line's bytes lie: a slice of a committed segment."""

    line_no: int
    custom_id: str | None
    outcome: Outcome
    segment_key: str
    offset: int
    length: int
    commit_no: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A committed object that holds result lines of one batch, back to back, each ending in a newline."""

    key: str
    batch_id: str
    bytes: int
    sha256: str
    worker_id: str | None = None
    """Whose device time is behind it; None: written without a worker."""
