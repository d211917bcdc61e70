"""Wake-up hints over Celery: how the application is set up, and how the control process publishes them.

A hint says that groups of a model are due. It is acknowledged before it is acted on, expires, and carries nothing else: losing, repeating
or delaying one changes latency only, because workers also look at the database by themselves.
"""

from __future__ import annotations

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from service.errors import Unavailable

QUEUE = "longdraft.wake"
TASK = "longdraft.drain"
HINT_SECONDS = 60
"""An older hint is dropped unread."""
SOCKET_SECONDS = 5


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
