"""A worker process that dies at a named point of the protocol.

The product has no crash points: this wraps the database and the object store that the worker opens, and ends the process from there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import service.worker
from service.config import load_settings
from service.log import configure_logging
from service.ports import BlobInfo, BlobStore, Database


class Trap:
    """Kills or stops the process at the `countdown`-th time that its point is reached."""

    def __init__(self, point: str, countdown: int, number: int) -> None:
        self.point, self.countdown, self.number = point, countdown, number

    def reached(self, point: str) -> None:
        if point == self.point:
            self.countdown -= 1
            if self.countdown == 0:
                os.kill(os.getpid(), self.number)
                if self.number != signal.SIGSTOP:
                    time.sleep(60)  # the signal may be handled a moment later


class TrappedDatabase:
    """Reaches `in_claim`, `in_commit` and `in_beat` just before COMMIT, `after_commit` just after."""

    def __init__(self, inner: Database, trap: Trap) -> None:
        self._inner, self._trap = inner, trap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def begin(self) -> Iterator[Any]:
        seen: set[str] = set()
        with self._inner.begin() as uow:
            uow.groups.claim = _noting(uow.groups.claim, "claim", seen)
            uow.results.add = _noting(uow.results.add, "add", seen)
            uow.groups.renew = _noting(uow.groups.renew, "renew", seen)
            yield uow
            if "claim" in seen:
                self._trap.reached("in_claim")
            if "add" in seen:
                self._trap.reached("in_commit")
            if "renew" in seen:
                self._trap.reached("in_beat")
        if "add" in seen:
            self._trap.reached("after_commit")


class TrappedBlobs:
    """Reaches `after_segment` when a segment is stored."""

    def __init__(self, inner: BlobStore, trap: Trap) -> None:
        self._inner, self._trap = inner, trap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put(self, key: str, data: bytes) -> BlobInfo:
        info = self._inner.put(key, data)
        if key.startswith("segments/"):
            self._trap.reached("after_segment")
        return info


def _noting(method: Callable[..., Any], name: str, seen: set[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if result:  # a claim that found nothing is not the point
            seen.add(name)
        return result

    return call


def run(name: str, environment: Mapping[str, str], log: str) -> None:
    """The process's main function: a worker with these settings. FAULT names a point and when, such as `after_segment:2`; FAULT_SIGNAL how
    to die there (default SIGKILL); FAULT_CLOCK by how many seconds the clock is off."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    point, _, countdown = environment.get("FAULT", "").partition(":")
    number = int(environment.get("FAULT_SIGNAL", signal.SIGKILL))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)  # shells start what runs in the background with some signals ignored
    trap = Trap(point, int(countdown or 1), number)
    if skew := float(environment.get("FAULT_CLOCK", 0)):
        real = time.time
        time.time = lambda: real() + skew
    open_database, open_blobs = service.worker.open_database, service.worker.open_blobs
    service.worker.open_database = lambda settings: TrappedDatabase(open_database(settings), trap)
    service.worker.open_blobs = lambda settings: TrappedBlobs(open_blobs(settings), trap)
    settings = load_settings(environment)
    configure_logging(settings)
    service.worker.run_worker(settings, worker_id=name)
