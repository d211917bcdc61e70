"""The one Celery task, and the worker thread that runs it. It carries a hint and no work: leases in the database decide who does what."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import structlog
from celery import Celery
from celery.worker import WorkController, state

from service.adapters.queue_celery import QUEUE, SOCKET_SECONDS, TASK, make_app

log = structlog.get_logger(__name__)


def register(app: Celery, on_hint: Callable[[str], None]) -> None:
    """Gives `app` the task `drain(model)`, which tells this process that groups of `model` are due."""

    @app.task(name=TASK, ignore_result=True, acks_late=False)
    def drain(model: str) -> None:
        on_hint(model)


class HintListener:
    """A Celery worker with a pool of one (`-P solo`) in a daemon thread, whose only task calls `on_hint` with the model's name.

    The engine has the main thread: Celery's own loop would be deaf while a drain runs, and a drain must not depend on the broker.
    """

    def __init__(self, broker_url: str, on_hint: Callable[[str], None]) -> None:
        self._app = make_app(broker_url)
        register(self._app, on_hint)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)

    def start(self) -> None:
        logging.getLogger("celery").setLevel(logging.WARNING)
        self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end. It is not waited for: it may be in the middle of a reconnect, and holds nothing that matters."""
        self._stopping.set()
        state.should_stop = 0  # type: ignore[assignment]  # None or an exit status; typed from its initial value

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                WorkController(
                    app=self._app,
                    pool_cls="solo",
                    concurrency=1,
                    queues=[QUEUE],
                    without_heartbeat=True,
                    without_mingle=True,
                    without_gossip=True,
                    loglevel=logging.WARNING,
                ).start()
            except BaseException as error:  # noqa: BLE001 - hints are worth no worker; the database is polled anyway
                log.warning("hint_listener_failed", error=repr(error))
            self._stopping.wait(SOCKET_SECONDS)
