"""Wake-up hints over Celery: published by the control process, consumed by a thread of each worker.

A hint says that groups of a model are due. It is acknowledged before it is acted on, expires, and carries nothing else: losing, repeating
or delaying one changes latency only, because workers also look at the database by themselves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import structlog
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from service.errors import Unavailable

QUEUE = "longdraft.wake"
TASK = "longdraft.drain"
HINT_SECONDS = 60
"""An older hint is dropped unread."""
SOCKET_SECONDS = 5

log = structlog.get_logger(__name__)


def make_app(broker_url: str) -> Celery:
    """The Celery application: JSON only, acknowledged early, no results, no prefetching, no remote control."""
    app = Celery("longdraft", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        task_default_queue=QUEUE,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=SOCKET_SECONDS,
        broker_transport_options={"socket_connect_timeout": SOCKET_SECONDS, "socket_timeout": SOCKET_SECONDS, "socket_keepalive": True},
    )
    return app


class CeleryQueue:
    """ports.TaskQueue that publishes to the broker."""

    def __init__(self, broker_url: str) -> None:
        self._app = make_app(broker_url)

    def wake(self, model: str) -> None:
        try:
            self._app.send_task(TASK, args=[model], expires=HINT_SECONDS, retry=False, ignore_result=True)
        except (OperationalError, RedisError, OSError) as error:
            raise Unavailable(f"The broker does not answer: {error}") from error

    def ping(self) -> None:
        try:
            with self._app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=SOCKET_SECONDS)
        except (OperationalError, RedisError, OSError) as error:
            raise Unavailable(f"The broker does not answer: {error}") from error


class HintListener:
    """A Celery worker with a pool of one (`-P solo`) in a daemon thread, whose only task calls `on_hint` with the model's name.

    The engine has the main thread: Celery's own loop would be deaf while a drain runs, and a drain must not depend on the broker.
    """

    def __init__(self, broker_url: str, on_hint: Callable[[str], None]) -> None:
        self._app = make_app(broker_url)
        from service.tasks import register

        register(self._app, on_hint)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hints", daemon=True)

    def start(self) -> None:
        logging.getLogger("celery").setLevel(logging.WARNING)
        self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end. It is not waited for: it may be in the middle of a reconnect, and holds nothing that matters."""
        from celery.worker import state

        self._stopping.set()
        state.should_stop = 0  # type: ignore[assignment]  # None or an exit status; typed from its initial value

    def _run(self) -> None:
        from celery.worker import WorkController

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
