"""What the use cases need of the outside world: a database with its stores, objects, and what answers lines. Adapters implement these."""

from __future__ import annotations

from service.ports.accounts import AccountStore, BucketAccessStore
from service.ports.batches import BatchStore, LineStore, RequestMemory, ResultStore
from service.ports.charges import Bucket, ChargeFilter, ChargeRow, CostStore, Ledger, SpendingStore, WorkRow
from service.ports.database import Database, UnitOfWork
from service.ports.files import FileGarbage, FileStore, UploadStore
from service.ports.inference import (
    InferenceRunner,
    Recalls,
    RunnerStats,
    TaskQueue,
)
from service.ports.objects import (
    BlobInfo,
    BlobStore,
    BlobWriter,
    PresignedRequest,
    Presigner,
    UserBucket,
    UserBuckets,
)
from service.ports.page import Page
from service.ports.work import Backlog, GroupStore, GroupWatch, MonitorStore, Outbox, OutboxItem, OutboxKind, OutboxLag
from service.ports.workers import LoadRow, LoadStore, ModelLoad, Refusals, WorkerRow, WorkerStore

__all__ = [
    "AccountStore",
    "Backlog",
    "BatchStore",
    "BlobInfo",
    "BlobStore",
    "BlobWriter",
    "Bucket",
    "BucketAccessStore",
    "ChargeFilter",
    "ChargeRow",
    "CostStore",
    "Database",
    "FileGarbage",
    "FileStore",
    "GroupStore",
    "GroupWatch",
    "InferenceRunner",
    "Ledger",
    "LineStore",
    "LoadRow",
    "LoadStore",
    "ModelLoad",
    "MonitorStore",
    "Outbox",
    "OutboxItem",
    "OutboxKind",
    "OutboxLag",
    "Page",
    "PresignedRequest",
    "Presigner",
    "Recalls",
    "Refusals",
    "RequestMemory",
    "ResultStore",
    "RunnerStats",
    "SpendingStore",
    "TaskQueue",
    "UnitOfWork",
    "UploadStore",
    "UserBucket",
    "UserBuckets",
    "WorkRow",
    "WorkerRow",
    "WorkerStore",
]
