"""A worker's third thread: keeps its leases alive, writes its meters, and takes lines out of the runner that it lost or must give up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog

from service.config import Timing
from service.errors import LongdraftError
from service.ports import Database, InferenceRunner, WorkerRow
from service.usecases.holdings import Holdings

TICK = 0.2
"""Seconds between looks at `stop`: how long a SIGTERM waits before running lines are aborted."""
RETRY = 1.0
"""Seconds until the next try after a heartbeat or a registration that did not reach the database."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """The worker's row: its id is what leases name."""

    id: str
    host: str
    pid: int


class Heartbeat:
    """Runs from `start` to `close`. `on_lost` is called with groups whose lease someone else took."""

    def __init__(
        self,
        identity: WorkerIdentity,
        database: Database,
        holdings: Holdings,
        runner: InferenceRunner,
        timing: Timing,
        *,
        between_commits: threading.Lock,
        stop: threading.Event,
        on_lost: Callable[[Collection[int]], None],
    ) -> None:
        self._identity = identity
        self._database = database
        self._holdings = holdings
        self._runner = runner
        self._interval = timing.heartbeat
        self._lease = timedelta(seconds=timing.lease)
        self._between_commits = between_commits
        self._stop = stop
        self._on_lost = on_lost
        self._closing = threading.Event()
        self._started = time.monotonic_ns()
        self._before = runner.stats()
        self._device = runner.device
        self.model: str | None = None
        """What the runner has loaded, for the meters."""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Registers the worker, once the database answers (a worker may be started before it), and begins to beat."""
        while not self._stop.is_set():
            try:
                with self._database.begin() as uow:
                    uow.workers.register(self._identity.id, host=self._identity.host, pid=self._identity.pid, device=self._device)
                break
            except LongdraftError as error:
                log.warning("worker_waits", worker=self._identity.id, error=error.message)
                self._stop.wait(RETRY)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            with self._database.begin() as uow:
                uow.workers.beat(self._row())
                uow.workers.stop(self._identity.id)
        except LongdraftError as error:
            log.warning("worker_row_not_closed", worker=self._identity.id, error=error.message)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._closing.wait(TICK):
            if self._stop.is_set():
                self._runner.abort([(line.batch_id, line.line_no) for line in self._holdings.running])
            if time.monotonic() < due:
                continue
            try:
                self._beat()
                due = time.monotonic() + self._interval
            except LongdraftError as error:
                log.warning("heartbeat_failed", worker=self._identity.id, error=error.message)
                due = time.monotonic() + min(RETRY, self._interval)

    def _beat(self) -> None:
        # A commit closes groups: their tokens must not be compared between that and their leaving the holdings.
        with self._between_commits, self._database.begin() as uow:
            tokens = self._holdings.tokens
            held = uow.groups.renew(tokens, self._lease) if tokens else set()
            uow.workers.beat(self._row())
        if lost := set(tokens) - held:
            self._on_lost(lost)

    def _row(self) -> WorkerRow:
        stats, before = self._runner.stats(), self._before
        now, wall_ns = datetime.now(UTC), time.monotonic_ns() - self._started
        busy_ns, load_ns = stats.busy_ns - before.busy_ns, stats.load_ns - before.load_ns
        profile_ns = stats.profile_ns - before.profile_ns
        return WorkerRow(
            id=self._identity.id,
            host=self._identity.host,
            pid=self._identity.pid,
            device=self._device,
            started_at=now,  # the database keeps its own times
            seen_at=now,
            stopped_at=None,
            model=self.model,
            busy_ns=busy_ns,
            # Idle is the device, with lines waiting or without: what the host does between steps keeps it waiting all the same.
            idle_ns=max(0, wall_ns - busy_ns - load_ns - profile_ns),
            load_ns=load_ns,
            profile_ns=profile_ns,
            tokens_per_second=stats.tokens_per_second,
            acceptance_length=stats.acceptance_length,
        )
