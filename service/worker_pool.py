"""The worker processes of one machine: as many as there is work for, none without."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.children import Backoff, Child, describe_exit
from service.errors import LongdraftError
from service.ports import Database

SECOND_WORKER_AFTER = 2.0
"""Seconds that groups must stay due before another worker joins: one that just started has not claimed yet."""


@dataclass(slots=True)
class Workers:
    """At most `limit` of them. Not a thread of its own: the supervisor calls `reap` and `fit` in turns."""

    limit: int
    make: Callable[[str, int], Child]
    """Worker id and slot -> a child that is not started yet. Slots count from 0; no two live workers have the same."""
    release: Callable[[str], None]
    """Gives back the leases of a dead worker at once."""
    say: Callable[[str], None]
    live: dict[str, Child] = field(default_factory=dict)
    backoff: Backoff = field(default_factory=Backoff)
    """Of all together: what kills one, a model that does not load say, will kill the next."""
    slots: dict[str, int] = field(default_factory=dict)
    _spawned: float = float("-inf")

    def reap(self) -> None:
        """Looks after the ones that ended: idle ones left in good order, dead ones held leases."""
        for worker_id, child in list(self.live.items()):
            status = child.ended()
            if status is None:
                continue
            del self.live[worker_id]
            self.slots.pop(worker_id, None)
            if status == 0:
                self.backoff.succeeded()
                self.say(f"worker {worker_id} left (idle)")
                continue
            self.release(worker_id)
            now = time.monotonic()
            pause = self.backoff.failed(now, now - child.started)
            self.say(f"worker {worker_id} ended with {describe_exit(status)}; the next may start in {pause:.1f} s. {child.last_words()}")

    def fit(self, due: int) -> None:
        """Starts a worker where groups are due and nobody is about to take them."""
        now = time.monotonic()
        if not due or len(self.live) >= self.limit or now < self.backoff.not_before:
            return
        if self.live and now - self._spawned < SECOND_WORKER_AFTER:
            return
        worker_id = f"worker-{secrets.token_hex(4)}"
        slot = min(set(range(self.limit)) - set(self.slots.values()))
        child = self.make(worker_id, slot)
        child.start()
        self.live[worker_id], self.slots[worker_id] = child, slot
        self._spawned = now
        self.say(f"worker {worker_id} started (pid {child.pid})")


def release_worker(database: Database, worker_id: str, say: Callable[[str], None]) -> None:
    """Gives back the leases of a worker that is known to be dead; where the database is away they run out by themselves."""
    try:
        with database.begin() as uow:
            uow.watch.take_back_worker(worker_id)
            uow.workers.stop(worker_id)
    except LongdraftError as error:
        say(f"the leases of {worker_id} run out by themselves: {error.message}")
