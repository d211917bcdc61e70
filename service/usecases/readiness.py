"""Can a process do its work? A worker is ready while it runs lines, while there are none, and while due ones have not waited for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from service.errors import LongdraftError, Unavailable
from service.ports import BlobStore, Database

CLAIM_WITHIN = 60.0
"""Seconds that groups may be due, and this worker idle, before it counts as one that does not do its work."""


class Claimer(Protocol):
    """What is asked of a GroupRunner."""

    last_claim: float

    @property
    def held(self) -> int: ...


class ClaimedLately:
    """Asked by probes, from any thread."""

    def __init__(self, database: Database, claimer: Claimer, stop: threading.Event, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._claimer = claimer
        self._stop = stop
        self._clock = clock
        self._due_since: float | None = None

    def __call__(self) -> tuple[bool, str]:
        """(ready, why). Raises Unavailable."""
        if self._stop.is_set():
            return False, "stopping"
        if held := self._claimer.held:
            self._due_since = None
            return True, f"{held} groups on lease"
        with self._database.begin() as uow:
            due = sum(uow.watch.due().values())
        now = self._clock()
        if not due:
            self._due_since = None
            return True, "nothing is due"
        self._due_since = now if self._due_since is None else self._due_since
        waited = now - max(self._due_since, self._claimer.last_claim)
        if waited < CLAIM_WITHIN:
            return True, f"{due} groups are due, for {waited:.0f} s"
        return False, f"{due} groups are due and none was claimed for {waited:.0f} s"


def parts_answer(database: Database, blobs: BlobStore) -> None:
    """What serving requests takes. Raises Unavailable naming the part that does not answer."""
    try:
        database.ping()
    except LongdraftError as error:
        raise Unavailable(f"The database does not answer: {error.message}") from error
    try:
        blobs.head("readiness")
    except LongdraftError as error:
        raise Unavailable(f"The object store does not answer: {error.message}") from error
