"""PostgreSQL behind the `Database` port: one block, one transaction, one store a table family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import exc

from service.adapters.postgres import advisory_key, closing_streams, sqlalchemy_url
from service.adapters.stores.accounts import Accounts
from service.adapters.stores.batches import Batches, Requests
from service.adapters.stores.buckets import BucketAccesses, Uploads
from service.adapters.stores.costs import Costs
from service.adapters.stores.files import Files, Garbage
from service.adapters.stores.groups import Groups, Watch
from service.adapters.stores.ledger import LedgerBook
from service.adapters.stores.lines import Lines
from service.adapters.stores.loads import Loads
from service.adapters.stores.monitor import Monitor
from service.adapters.stores.outbox import OutboxRows
from service.adapters.stores.results import Results
from service.adapters.stores.spending import Spending
from service.adapters.stores.workers import Workers
from service.errors import Unavailable
from service.ports import (
    AccountStore,
    BatchStore,
    BucketAccessStore,
    CostStore,
    FileGarbage,
    FileStore,
    GroupStore,
    GroupWatch,
    Ledger,
    LineStore,
    LoadStore,
    MonitorStore,
    Outbox,
    RequestMemory,
    ResultStore,
    SpendingStore,
    UnitOfWork,
    UploadStore,
    WorkerStore,
)


class Transaction:
    """The stores of one open transaction (ports.UnitOfWork). `now` is its database time."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self.now: datetime = connection.execute(sa.select(sa.func.now())).scalar_one().astimezone(UTC)
        self.accounts: AccountStore = Accounts(connection)
        self.files: FileStore = Files(connection)
        self.garbage: FileGarbage = Garbage(connection)
        self.batches: BatchStore = Batches(connection)
        self.requests: RequestMemory = Requests(connection)
        self.lines: LineStore = Lines(connection)
        self.results: ResultStore = Results(connection)
        self.groups: GroupStore = Groups(connection)
        self.watch: GroupWatch = Watch(connection)
        self.outbox: Outbox = OutboxRows(connection)
        self.ledger: Ledger = LedgerBook(connection)
        self.workers: WorkerStore = Workers(connection)
        self.loads: LoadStore = Loads(connection)
        self.monitor: MonitorStore = Monitor(connection)
        self.costs: CostStore = Costs(connection)
        self.spending: SpendingStore = Spending(connection)
        self.bucket_access: BucketAccessStore = BucketAccesses(connection)
        self.uploads: UploadStore = Uploads(connection)

    def try_lock(self, name: str) -> bool:
        return bool(self._connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(advisory_key(name)))).scalar_one())


class PostgresDatabase:
    """A pool of connections that survives restarts of the server: every connection is tried before it is lent.

    `patience`: seconds after which the other end counts as gone. The server ends a transaction in which nothing was asked for that long
    (one that streams rows has longer), so that what it locked is free although its process is frozen and the connection stands; either
    side gives up a connection whose bytes nobody takes.
    """

    def __init__(self, url: str, *, pool_size: int = 8, patience: float = 60.0) -> None:
        milliseconds = max(1, round(patience * 1000))
        self._engine = sa.create_engine(
            sqlalchemy_url(url),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=True,
            pool_timeout=30,
            connect_args={
                "application_name": "longdraft",
                "connect_timeout": 10,
                "keepalives_idle": max(1, round(patience / 2)),
                "keepalives_interval": max(1, round(patience / 6)),
                "keepalives_count": 3,
                "tcp_user_timeout": milliseconds,
                "options": f"-c timezone=UTC -c idle_in_transaction_session_timeout={milliseconds} -c tcp_user_timeout={milliseconds}",
            },
        )

    @contextlib.contextmanager
    def begin(self) -> Iterator[UnitOfWork]:
        try:
            with self._engine.begin() as connection, closing_streams(connection):
                yield Transaction(connection)
        except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
            raise Unavailable(f"The database does not answer or asks to try again: {_first_line(error)}") from error
        except exc.DBAPIError as error:
            if error.connection_invalidated:
                raise Unavailable(f"The connection to the database was lost: {_first_line(error)}") from error
            raise

    def ping(self) -> None:
        with self.begin():
            pass

    def close(self) -> None:
        self._engine.dispose()


def _first_line(error: BaseException) -> str:
    original = getattr(error, "orig", None) or error
    return str(original).strip().partition("\n")[0]
