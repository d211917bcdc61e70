"""The database: the unit of work that makes one transaction of what its stores do.

All database work goes through `Database.begin()`: one block, one transaction, committed when the block ends without an exception.
Lock order everywhere: groups in id order, then batches in id order, then outbox rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol

from service.ports.accounts import AccountStore, BucketAccessStore
from service.ports.batches import BatchStore, LineStore, RequestMemory, ResultStore
from service.ports.charges import CostStore, Ledger, SpendingStore
from service.ports.files import FileGarbage, FileStore, UploadStore
from service.ports.work import GroupStore, GroupWatch, MonitorStore, Outbox
from service.ports.workers import LoadStore, WorkerStore


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
