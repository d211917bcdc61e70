"""The database: stores, and the unit of work that makes one transaction of what they do.

All database work goes through `Database.begin()`: one block, one transaction, committed when the block ends without an exception.
Lock order everywhere: groups in id order, then batches in id order, then outbox rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from service.domain.account import ApiKey, BucketAccess, File, FilePurpose, PendingUpload, Project
from service.domain.job import Batch
from service.domain.line import GroupLease, LineOutcome, PendingLine, PlannedGroup, Segment, StagedLine, StoredResult
from service.domain.money import ChargeDetail, LedgerTransaction, PriceBook, Rates, Reservation, Reserved
from service.domain.usage import Usage, Work

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """One page of a listing, in the order asked for."""

    items: Sequence[Item]
    has_more: bool


class AccountStore(Protocol):
    """Projects and their keys."""

    def add_project(self, name: str) -> Project: ...
    def projects(self) -> Sequence[Project]: ...
    def add_key(self, key: ApiKey) -> None: ...
    def keys(self, project_id: str | None = None) -> Sequence[ApiKey]: ...
    def keys_with_prefix(self, prefix: str) -> Sequence[ApiKey]:
        """Live keys only; the caller compares digests in constant time."""
        ...

    def touch_key(self, key_id: str) -> None:
        """Records the use, at most once a minute a key."""
        ...

    def revoke_key(self, key_id: str) -> bool: ...


class FileStore(Protocol):
    """Files by owner. A deleted file answers like an unknown one."""

    def add(self, file: File) -> None: ...
    def get(self, project_id: str, file_id: str) -> File | None: ...
    def page(self, project_id: str, *, after: str | None, limit: int, ascending: bool, purpose: FilePurpose | None) -> Page[File]:
        """Raises InvalidRequest where `after` names no file of this project."""
        ...

    def delete(self, project_id: str, file_id: str) -> bool: ...
    def set_expiry(self, file_id: str, at: datetime) -> None: ...
    def in_use(self, file_id: str) -> bool:
        """Whether a batch that has not ended reads it."""
        ...


class BucketAccessStore(Protocol):
    """How projects reach their own buckets: at most one row each."""

    def get(self, project_id: str) -> BucketAccess | None: ...
    def put(self, access: BucketAccess) -> None:
        """Replaces what was there."""
        ...

    def delete(self, project_id: str) -> bool: ...


class FileGarbage(Protocol):
    """Objects of files that nobody needs any more."""

    def unreferenced_keys(self, limit: int) -> Sequence[str]:
        """Storage keys of deleted or expired files that no open batch reads: the janitor removes the objects."""
        ...

    def forget_keys(self, keys: Collection[str]) -> None: ...
    def named(self, keys: Collection[str]) -> set[str]:
        """Those of these keys that any file, deleted ones included, or any announced upload names."""
        ...


class UploadStore(Protocol):
    """Files that clients were given a URL to put."""

    def add(self, upload: PendingUpload) -> None: ...
    def get(self, project_id: str, upload_id: str) -> PendingUpload | None: ...
    def remove(self, upload_id: str) -> None: ...
    def stale(self, older_than: timedelta, limit: int) -> Sequence[PendingUpload]:
        """Those whose URL ran out longer ago than this, oldest first."""
        ...


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


class GroupStore(Protocol):
    """Groups of lines: the unit of lease and recovery. Leases are judged by the database's clock."""

    def plan(self, batch_id: str, groups: Iterable[PlannedGroup]) -> int:
        """Creates the groups of a validated batch, due at once; returns how many."""
        ...

    def claim(self, worker_id: str, *, model: str | None, lease: timedelta, max_lines: int) -> Sequence[GroupLease]:
        """Takes due groups (highest priority, then soonest expiry, then oldest), raising their tokens; SKIP LOCKED.

        At least one group if any is due, further ones while they fit `max_lines`. A suspect group comes alone.
        `model=None` takes the model with the most due work.
        """
        ...

    def renew(self, leases: Mapping[int, int], lease: timedelta) -> set[int]:
        """Extends {group id: token}; returns the ids still held."""
        ...

    def lock_held(self, leases: Mapping[int, int]) -> set[int]:
        """Locks these groups FOR UPDATE in id order; returns the ids whose token still matches and that are open."""
        ...

    def close_finished(self, group_ids: Collection[int]) -> set[int]:
        """Closes those whose lines all have results (rows are locked by the caller); returns the ids closed."""
        ...

    def release(self, leases: Mapping[int, int], *, delay: timedelta = timedelta(0)) -> None:
        """Gives groups back, due again after `delay`. A token that no longer matches is left alone."""
        ...

    def close_batch(self, batch_id: str) -> int:
        """Locks and closes all open groups of a batch and raises their tokens, so that no worker can commit to them."""
        ...


class GroupWatch(Protocol):
    """The sweeper's and autoscaler's view of the groups."""

    def due(self) -> Mapping[str, int]:
        """Model -> groups claimable now."""
        ...

    def due_or_leased(self) -> Mapping[str, int]:
        """Model -> open groups of running batches: what the autoscaler scales on."""
        ...

    def open_in(self, batch_id: str) -> int: ...
    def take_back_dead(self, limit: int) -> Sequence[int]:
        """Ends leases that ran out: tokens raised, groups due again. Returns their ids."""
        ...

    def take_back_worker(self, worker_id: str) -> Sequence[int]:
        """The same for every lease of a worker known to be dead."""
        ...

    def isolate(self, group_ids: Collection[int], *, attempts: int) -> int:
        """Moves unfinished lines admitted at least `attempts` times into suspect groups of one line each; returns how many."""
        ...


class OutboxKind(StrEnum):
    VALIDATE = "validate"
    FINALIZE = "finalize"
    WAKE = "wake"
    """Tell workers of a model that groups are due (a hint: losing it costs latency only)."""


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """Work promised in the transaction that made it due; leased and fenced like a group."""

    id: int
    kind: OutboxKind
    batch_id: str | None
    payload: Mapping[str, Any]
    token: int
    attempts: int


class Outbox(Protocol):
    """The control process's work list."""

    def add(self, kind: OutboxKind, *, batch_id: str | None = None, payload: Mapping[str, Any] | None = None) -> None:
        """At most one open item for (kind, batch_id, payload): a second add changes nothing."""
        ...

    def claim(self, owner: str, *, kinds: Collection[OutboxKind], lease: timedelta, limit: int) -> Sequence[OutboxItem]: ...
    def renew(self, item: OutboxItem, lease: timedelta) -> bool: ...
    def hold(self, item: OutboxItem) -> None:
        """Locks the row and compares the token: call it first in every transaction that acts for the item. Raises LeaseLost."""
        ...

    def done(self, item: OutboxItem) -> None: ...
    def retry(self, item: OutboxItem, *, error: str, delay: timedelta) -> None: ...
    def open_items(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ChargeRow:
    """An aggregate of the ledger: amounts in femto-dollars."""

    key: tuple[str, ...]
    amounts: Mapping[str, int]
    quantities: Mapping[str, int]
    lines: int

    @property
    def total(self) -> int:
        return sum(self.amounts.values())

    def evolve(self, **changes: Any) -> ChargeRow:
        return replace(self, **changes)


class Ledger(Protocol):
    """Append-only double-entry ledger and the versioned price book."""

    def post(self, transactions: Sequence[LedgerTransaction]) -> None:
        """Inserts them; a second charge for a line raises Conflict and nothing is written."""
        ...

    def batch_total(self, batch_id: str) -> ChargeRow: ...
    def report(self, *, project_id: str | None, start: datetime, end: datetime, by: Sequence[str]) -> Sequence[ChargeRow]:
        """Charges net of reversals, grouped by any of day, model, project, batch, and `tag:<metadata key>`."""
        ...

    def price_book(self, version: int | None = None) -> PriceBook:
        """The newest, or a pinned version. Raises NotFound."""
        ...

    def price_history(self) -> Sequence[PriceBook]: ...
    def set_prices(self, models: Mapping[str, Rates], default: Rates | None = None) -> PriceBook:
        """A new version: the newest one with these entries replaced."""
        ...

    def violations(self, batch_id: str | None = None) -> Sequence[str]:
        """What breaks O1-O3 and O5 of the billing oracles, one sentence each; empty is good."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker process and where its wall time went, nanoseconds."""

    id: str
    host: str
    pid: int
    device: str
    started_at: datetime
    seen_at: datetime
    stopped_at: datetime | None
    model: str | None = None
    busy_ns: int = 0
    idle_ns: int = 0
    load_ns: int = 0
    profile_ns: int = 0
    tokens_per_second: float = 0.0
    acceptance_length: float = 0.0


@dataclass(frozen=True, slots=True)
class ChargeFilter:
    """What a report looks at: from `start` up to, not including, `end`; None takes all."""

    start: datetime
    end: datetime
    project_ids: Collection[str] | None = None
    api_key_ids: Collection[str] | None = None
    batch_ids: Collection[str] | None = None
    models: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Charges of one time bucket that begins at `start`, for one group."""

    start: datetime
    charges: ChargeRow


@dataclass(frozen=True, slots=True)
class WorkRow:
    """What delivered lines made one worker do. `worker` and `device` are empty for lines that were settled without one."""

    key: tuple[str, ...]
    worker: str
    device: str
    lines: int
    work: Work


class CostStore(Protocol):
    """The ledger and the token ledger as reports and exports read them. Groups are named as in `Ledger.report`."""

    def buckets(self, which: ChargeFilter, *, width: timedelta, by: Sequence[str]) -> Sequence[Bucket]:
        """Charges net of reversals, by time (buckets aligned to the epoch, UTC) and group, in this order; empty buckets are left out."""
        ...

    def details(self, which: ChargeFilter) -> Iterator[ChargeDetail]:
        """The finest aggregate, oldest first; streamed."""
        ...

    def work(self, which: ChargeFilter, *, by: Sequence[str]) -> Sequence[WorkRow]:
        """Token ledgers of the lines delivered in the time chosen, by group and worker."""
        ...

    def workers(self, start: datetime, end: datetime) -> Sequence[WorkerRow]:
        """Those that lived at some time between; their meters are of their whole lives."""
        ...

    def charge_of(self, batch_id: str, line_no: int) -> LedgerTransaction | None: ...


class SpendingStore(Protocol):
    """Caps (`max_cost`) on what a batch may cost. Locked after groups and batches."""

    def reserve(self, batch_id: str, wanted: Sequence[Reservation]) -> Reserved:
        """Holds the worst cases that fit under the cap; all are granted where there is no cap."""
        ...

    def room(self, batch_id: str) -> int | None:
        """Femto-dollars that may still be charged, the row locked; None where there is no cap."""
        ...

    def settle(self, batch_id: str, line_nos: Collection[int], charged: int) -> None:
        """Ends the reservations of delivered lines and adds what they were charged."""
        ...


class WorkerStore(Protocol):
    def register(self, worker_id: str, *, host: str, pid: int, device: str) -> None: ...
    def beat(self, worker: WorkerRow) -> None:
        """Writes the meters and raises `seen_at` to database time."""
        ...

    def stop(self, worker_id: str) -> None: ...
    def get(self, worker_id: str) -> WorkerRow | None: ...
    def live(self, within: timedelta) -> Sequence[WorkerRow]: ...


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One attempt of a worker to load a model, for a batch whose groups it had claimed. Nanoseconds.

    `spawn_ns`: from the start of the process until the worker was registered; 0 but for the first load of a process. `error`: why it was
    refused, None where it was loaded; `lasting`: trying again on the same machine will not help.
    """

    worker_id: str
    model: str
    batch_id: str | None
    claimed_at: datetime
    spawn_ns: int = 0
    load_ns: int = 0
    profile_ns: int = 0
    profile_reused: bool = False
    error: str | None = None
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class LoadRow:
    """A load as it is reported. `due_at`: when the batch's groups became due. `prefill_ns`: from the first step to the first token;
    `decode_ns`: from there to the commit of the first results."""

    load: ModelLoad
    device: str
    submitted_at: datetime | None
    due_at: datetime | None
    ended_at: datetime
    first_result_at: datetime | None
    prefill_ns: int
    decode_ns: int


@dataclass(frozen=True, slots=True)
class Refusals:
    """How often a model was refused, and how many of these refusals were lasting."""

    count: int
    lasting: int


class LoadStore(Protocol):
    """Loads of models by workers."""

    def note(self, load: ModelLoad) -> int:
        """Records it and returns its id."""
        ...

    def answered(self, load_id: int, *, prefill_ns: int, decode_ns: int) -> None:
        """The first results after this load are committed."""
        ...

    def between(self, start: datetime, end: datetime) -> Sequence[LoadRow]: ...
    def refusals(self, model: str, within: timedelta) -> Refusals:
        """Of that time; none where any worker could load the model in it."""
        ...

    def obstacles(self, batch_ids: Collection[str], within: timedelta) -> Mapping[str, Sequence[tuple[str, str]]]:
        """Batch -> (model, error) of models with open groups whose last load, in that time, was refused."""
        ...


@dataclass(frozen=True, slots=True)
class OutboxLag:
    """Open items of a kind, and by how many seconds the oldest is late."""

    open: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Backlog:
    """What there is to do. `groups`: (model, due | leased | waiting) -> how many; `batches`: status -> how many have not ended."""

    groups: Mapping[tuple[str, str], int]
    batches: Mapping[str, int]
    outbox: Mapping[OutboxKind, OutboxLag]
    workers: int
    refused: Collection[str]
    """Models whose last load was refused, today."""


class MonitorStore(Protocol):
    def backlog(self, live_within: timedelta) -> Backlog:
        """`live_within`: how recently a live worker must have been heard of."""
        ...


class UnitOfWork(Protocol):
    """One transaction. `now` is its database time, UTC."""

    now: datetime
    accounts: AccountStore
    files: FileStore
    garbage: FileGarbage
    batches: BatchStore
    requests: RequestMemory
    lines: LineStore
    results: ResultStore
    groups: GroupStore
    watch: GroupWatch
    outbox: Outbox
    ledger: Ledger
    workers: WorkerStore
    loads: LoadStore
    monitor: MonitorStore
    costs: CostStore
    spending: SpendingStore
    bucket_access: BucketAccessStore
    uploads: UploadStore

    def try_lock(self, name: str) -> bool:
        """A transaction-scoped advisory lock; False where another holds it."""
        ...


class Database(Protocol):
    def begin(self) -> AbstractContextManager[UnitOfWork]:
        """Raises Unavailable where the database does not answer, and for deadlocks and serialisation failures: try again."""
        ...

    def ping(self) -> None: ...
    def close(self) -> None: ...
