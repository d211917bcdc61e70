"""The worker processes of one machine: as many as there is work for, none without."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.children import Backoff, Child, describe_exit

SECOND_WORKER_AFTER = 2.0
"""Seconds that groups must stay due before another worker joins: one that just started has not claimed yet."""


@dataclass(slots=True)
class Workers:
    """At most `limit` of them. Not a thread of its own: the supervisor calls `reap` and `fit` in turns."""

    limit: int
    make: Callable[[str], Child]
    """Worker id -> a child that is not started yet."""
    release: Callable[[str], None]
    """Gives back the leases of a dead worker at once."""
    say: Callable[[str], None]
    live: dict[str, Child] = field(default_factory=dict)
    backoff: Backoff = field(default_factory=Backoff)
    """Of all together: what kills one, a model that does not load say, will kill the next."""
    _spawned: float = float("-inf")

    def reap(self) -> None:
        """Looks after the ones that ended: idle ones left in good order, dead ones held leases."""
        for worker_id, child in list(self.live.items()):
            status = child.ended()
            if status is None:
                continue
            del self.live[worker_id]
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
        child = self.make(worker_id)
        child.start()
        self.live[worker_id] = child
        self._spawned = now
        self.say(f"worker {worker_id} started (pid {child.pid})")
