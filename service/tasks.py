"""The one Celery task. It carries a hint and no work: leases in the database decide who does what."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from service.adapters.queue_celery import TASK


def register(app: Celery, on_hint: Callable[[str], None]) -> None:
    """Gives `app` the task `drain(model)`, which tells this process that groups of `model` are due."""

    @app.task(name=TASK, ignore_result=True, acks_late=False)
    def drain(model: str) -> None:
        on_hint(model)
