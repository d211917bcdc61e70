"""The control process: keeps every promise in the outbox, and sweeps. It needs no torch and holds no state of its own.

Each item is leased and fenced. Items are carried out in a few threads; one more renews their leases. Whatever fails is put back with a
growing delay; whatever is not put back (this process died, the database was away) becomes due again when its lease runs out.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from service.errors import LeaseLost, LongdraftError
from service.metrics import ControlMetrics
from service.ops import Readiness, ops_server
from service.ports import OutboxItem, OutboxKind
from service.usecases.finalize import finalize_batch
from service.usecases.janitor import UploadOrphans, clean
from service.usecases.sweep import sweep
from service.usecases.validate import validate_batch

if TYPE_CHECKING:
    from service.bootstrap import Services

HEAVY = 4
"""Validations and finalisations at once: they wait for disks and the database more than they compute."""
WAKES = 50
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds until an item that failed is tried again; doubling."""
OUTAGE_SECONDS = 1.0
CLEAN_SECONDS = 600.0

log = structlog.get_logger(__name__)


def run_control(services: Services, stop: threading.Event) -> None:
    """Runs until `stop` is set, then lets running items finish (at most `timing.shutdown_grace` seconds)."""
    control = Control(services)
    with ops_server(services.settings, metrics=control.metrics.text, ready=control.ready):
        control.run(stop)


class Control:
    """One control process. Any number of them may run on the same database."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._database = services.database
        self._timing = services.settings.timing
        self._lease = timedelta(seconds=self._timing.lease)
        self._owner = f"control-{socket.gethostname()}-{os.getpid()}"
        self._running: dict[Future[None], OutboxItem] = {}
        self._renewed = 0.0
        self._orphans = UploadOrphans()
        self._last_round: dict[str, float] = {}
        self.metrics = ControlMetrics(services.database)
        self._handlers: Mapping[OutboxKind, Callable[[OutboxItem], None]] = {
            OutboxKind.VALIDATE: self._validate,
            OutboxKind.FINALIZE: self._finalize,
        }

    def run(self, stop: threading.Event) -> None:
        log.info("control_ready", owner=self._owner)
        threading.Thread(target=self._look_at_store, name="store", daemon=True).start()
        threads = [
            threading.Thread(target=self._repeat, args=(name, every, action, stop), name=name, daemon=True)
            for name, every, action in (
                ("wakes", self._timing.relay, self._relay_wakes),
                ("sweep", self._timing.sweep, self._sweep),
                ("janitor", CLEAN_SECONDS, self._clean),
            )
        ]
        for thread in threads:
            thread.start()
        pool = ThreadPoolExecutor(HEAVY, thread_name_prefix="item")
        try:
            self._repeat("items", self._timing.relay, lambda: self._start_items(pool), stop)
            self._wait_for_items()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for thread in threads:
            thread.join(OUTAGE_SECONDS)
        log.info("control_stopped", owner=self._owner)

    def _repeat(self, name: str, every: float, action: Callable[[], object], stop: threading.Event) -> None:
        """Calls `action` again and again; an outage or a bug in one round costs that round."""
        while not stop.is_set():
            pause = every
            try:
                action()
                self._last_round[name] = time.monotonic()
            except LongdraftError as error:
                log.warning("control_waits", part=name, error=error.message)
                pause = max(every, OUTAGE_SECONDS)
            except Exception:
                log.exception("control_failed", part=name)
                pause = max(every, OUTAGE_SECONDS)
            stop.wait(pause)

    def ready(self) -> Readiness:
        """Whether every repeated part came through lately (the janitor has hours). Raises Unavailable."""
        self._database.ping()
        now = time.monotonic()
        patience = {"items": self._timing.lease, "wakes": self._timing.lease, "sweep": 4 * self._timing.sweep + self._timing.lease}
        late = [name for name, seconds in patience.items() if now - self._last_round.get(name, float("-inf")) > seconds]
        return Readiness(not late, f"no round lately: {', '.join(late)}" if late else "every part works")

    def _sweep(self) -> None:
        try:
            self.metrics.swept(sweep(self._database))
        except Exception:
            self.metrics.sweep_failed()
            raise

    def _look_at_store(self) -> None:
        """Once: what it can do goes into the log, and into the adapter's memory."""
        try:
            log.info("object_store", **{name.replace(" ", "_"): value for name, value in self._services.blobs.probe().items()})
        except LongdraftError as error:
            log.warning("object_store_fails", error=error.message)

    def _clean(self) -> None:
        removed = clean(self._database, self._services.blobs) + self._orphans.remove(self._database, self._services.blobs)
        self.metrics.removed(removed)

    # --- wake-ups ---------------------------------------------------------------------------------------------------------------

    def _relay_wakes(self) -> None:
        with self._database.begin() as uow:
            items = uow.outbox.claim(self._owner, kinds=[OutboxKind.WAKE], lease=self._lease, limit=WAKES)
        for item in items:
            self._carry_out(item, self._wake)

    def _wake(self, item: OutboxItem) -> None:
        """A hint reaches one worker: as many are sent as could share the work."""
        model = str(item.payload["model"])
        with self._database.begin() as uow:
            hints = min(uow.watch.due().get(model, 0), len(uow.workers.live(self._lease)))
        for _ in range(max(1, hints)):
            self._services.queue.wake(model)
        with self._database.begin() as uow:
            uow.outbox.done(item)

    # --- validation and finalisation --------------------------------------------------------------------------------------------

    def _start_items(self, pool: ThreadPoolExecutor) -> None:
        self._running = {future: item for future, item in self._running.items() if not future.done()}
        self._renew()
        free = HEAVY - len(self._running)
        if not free:
            return
        with self._database.begin() as uow:
            items = uow.outbox.claim(self._owner, kinds=list(self._handlers), lease=self._lease, limit=free)
        for item in items:
            self._running[pool.submit(self._carry_out, item, self._handlers[item.kind])] = item

    def _renew(self) -> None:
        """Leases of running items. One that was lost is noticed by its handler, in the transaction that would have mattered."""
        now = time.monotonic()
        if not self._running or now - self._renewed < self._timing.lease / 3:
            return
        with self._database.begin() as uow:
            for item in self._running.values():
                uow.outbox.renew(item, self._lease)
        self._renewed = now

    def _wait_for_items(self) -> None:
        deadline = time.monotonic() + self._timing.shutdown_grace
        for future in self._running:
            try:
                future.result(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                log.warning("item_cut_off", item=self._running[future].id)

    def _carry_out(self, item: OutboxItem, handler: Callable[[OutboxItem], None]) -> None:
        """Runs a handler; a failure puts the item back."""
        started = time.monotonic()
        result = "done"
        try:
            handler(item)
        except LeaseLost as error:
            result = "lost"
            log.warning("item_lost", item=item.id, kind=item.kind.value, batch_id=item.batch_id, error=error.message)
        except LongdraftError as error:
            result = "retried"
            log.warning("item_waits", item=item.id, kind=item.kind.value, batch_id=item.batch_id, error=error.message)
            self._put_back(item, error.message)
        except Exception as error:
            result = "failed"
            log.exception("item_failed", item=item.id, kind=item.kind.value, batch_id=item.batch_id)
            self._put_back(item, repr(error))
        self.metrics.item(item.kind.value, result, time.monotonic() - started)

    def _put_back(self, item: OutboxItem, error: str) -> None:
        delay = timedelta(seconds=min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(item.attempts - 1, 10)))
        try:
            with self._database.begin() as uow:
                uow.outbox.retry(item, error=error, delay=delay)
        except LongdraftError as outage:
            log.warning("item_left_to_its_lease", item=item.id, error=outage.message)

    def _validate(self, item: OutboxItem) -> None:
        settings = self._services.settings
        validate_batch(
            item,
            database=self._database,
            blobs=self._services.blobs,
            buckets=self._services.buckets,
            limits=settings.limits,
            resolve_model=settings.resolve_model,
            lease=self._lease,
            group_lines=settings.group_lines,
        )

    def _finalize(self, item: OutboxItem) -> None:
        finalize_batch(item, database=self._database, blobs=self._services.blobs, buckets=self._services.buckets)
