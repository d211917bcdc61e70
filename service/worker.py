"""A worker process: one runner, kept loaded, that drains due groups whenever there are any.

The main thread runs the engine. Wake-up hints arrive in a thread of their own; without a broker the worker finds work a little later, by
looking at the database. SIGTERM ends it in order: what is finished is committed, the rest is given back at once.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from types import FrameType

import structlog

from service.bootstrap import make_runner, open_blobs, open_database
from service.children import process_age_ns
from service.config import Settings
from service.errors import Unavailable
from service.metrics import WorkerMetrics
from service.ops import Readiness, ops_server
from service.ports import BlobStore, Database, InferenceRunner
from service.tasks import HintListener
from service.usecases.heartbeat import WorkerIdentity
from service.usecases.readiness import ClaimedLately
from service.usecases.run_groups import GroupRunner

POLL_SECONDS = 1.0
"""How often an idle worker looks for due groups without a hint: one indexed query."""
OUTAGE_SECONDS = 2.0

log = structlog.get_logger(__name__)


def run_worker(settings: Settings, *, worker_id: str | None = None, exit_when_idle: bool = False) -> None:
    """Runs until SIGTERM or SIGINT (a second one ends the process at once), or, with `exit_when_idle`, until it has had nothing to do for
    `timing.worker_idle` seconds. Call it from the main thread.

    Raises:
        Exception: what the engine died of; the process should end with an error, so that whoever supervises it starts another.
    """
    identity = WorkerIdentity(worker_id or f"worker-{secrets.token_hex(4)}", socket.gethostname(), os.getpid())
    stop, hint = threading.Event(), threading.Event()
    _stop_on_signals(stop, hint)
    database = open_database(settings)
    listener = HintListener(settings.broker_url, lambda _: hint.set()) if settings.broker_url else None
    runner = make_runner(settings)
    try:
        if listener:
            listener.start()
        _work(
            settings, identity, database, open_blobs(settings), runner, stop, hint, settings.timing.worker_idle if exit_when_idle else None
        )
    finally:
        if listener:
            listener.stop()
        runner.close()
        database.close()


def _work(
    settings: Settings,
    identity: WorkerIdentity,
    database: Database,
    blobs: BlobStore,
    runner: InferenceRunner,
    stop: threading.Event,
    hint: threading.Event,
    leave_after: float | None,
) -> None:
    groups = GroupRunner(
        identity,
        database=database,
        blobs=blobs,
        runner=runner,
        timing=settings.timing,
        group_lines=settings.group_lines,
        model_refusals=settings.model_refusals,
        age_ns=process_age_ns,
        stop=stop,
        hint=hint,
    )
    metrics = WorkerMetrics(runner, groups)
    groups.observe = metrics.delivered
    lately = ClaimedLately(database, groups, stop)
    with ops_server(settings, metrics=metrics.text, ready=lambda: Readiness(*lately())), groups:
        log.info("worker_ready", worker=identity.id, device=runner.device)
        last_work = time.monotonic()
        while not stop.is_set():
            try:
                if groups.drain():
                    last_work = time.monotonic()
            except Unavailable as error:
                log.warning("worker_waits", worker=identity.id, error=error.message)
                stop.wait(OUTAGE_SECONDS)
            if leave_after is not None and time.monotonic() - last_work >= leave_after:
                log.info("worker_idle", worker=identity.id)
                break
            hint.wait(POLL_SECONDS)
    log.info("worker_stopped", worker=identity.id, delivered=groups.delivered)


def _stop_on_signals(stop: threading.Event, hint: threading.Event) -> None:
    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()
        hint.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
