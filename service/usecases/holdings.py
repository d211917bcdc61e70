"""What one worker holds: leases on groups, and where each of their lines stands. No I/O; every method is safe from any thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from service.domain.line import GroupLease, LineOutcome, PendingLine

Key = tuple[str, int]


class Holdings:
    """Lines wait, run and are done, in this order; a group that is dropped takes its lines along, wherever they are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: dict[int, GroupLease] = {}
        self._waiting: deque[PendingLine] = deque()
        self._running: dict[Key, PendingLine] = {}
        self._done: list[LineOutcome] = []
        self._oldest_done = 0.0

    def add(self, leases: Iterable[GroupLease], pending: Iterable[PendingLine]) -> None:
        """Lines whose group is not held (any more) are left out."""
        with self._lock:
            self._leases.update({lease.group_id: lease for lease in leases})
            self._waiting.extend(line for line in pending if line.group_id in self._leases)

    @property
    def leases(self) -> Mapping[int, GroupLease]:
        """A snapshot by group id."""
        with self._lock:
            return dict(self._leases)

    @property
    def tokens(self) -> dict[int, int]:
        """A snapshot of {group id: fencing token}: what renewals and commits are judged by."""
        with self._lock:
            return {group_id: lease.token for group_id, lease in self._leases.items()}

    @property
    def unfinished(self) -> int:
        """Lines that wait or run."""
        with self._lock:
            return len(self._waiting) + len(self._running)

    @property
    def running(self) -> Sequence[PendingLine]:
        with self._lock:
            return list(self._running.values())

    @property
    def done(self) -> int:
        """Outcomes that are not committed yet."""
        with self._lock:
            return len(self._done)

    def lease_of(self, line: PendingLine) -> GroupLease | None:
        with self._lock:
            return self._leases.get(line.group_id)

    def take(self, limit: int) -> list[PendingLine]:
        """The next waiting lines; they count as running from now on."""
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
            self._running.update({(line.batch_id, line.line_no): line for line in taken})
            return taken

    def put_back(self, lines: Sequence[PendingLine]) -> None:
        """Undoes `take` for lines that never reached the runner."""
        with self._lock:
            kept = [line for line in lines if self._running.pop((line.batch_id, line.line_no), None)]
            self._waiting.extendleft(reversed(kept))

    def defer(self, keys: Iterable[Key]) -> None:
        """Sends taken lines, which never reached the runner, back behind all others."""
        with self._lock:
            self._waiting.extend(line for key in keys if (line := self._running.pop(key, None)))

    def is_running(self, key: Key) -> bool:
        with self._lock:
            return key in self._running

    def finish(self, outcome: LineOutcome) -> bool:
        """Notes an outcome; False where nobody here waits for it (its group was dropped meanwhile)."""
        with self._lock:
            if self._running.pop(outcome.key, None) is None:
                return False
            if not self._done:
                self._oldest_done = time.monotonic()
            self._done.append(outcome)
            return True

    def take_done(self, limit: int) -> list[LineOutcome]:
        """Outcomes to commit, oldest first."""
        with self._lock:
            taken, self._done = self._done[:limit], self._done[limit:]
            self._oldest_done = time.monotonic()
            return taken

    def done_for(self) -> float:
        """Seconds that the oldest uncommitted outcome has been waiting; 0 where there is none."""
        with self._lock:
            return time.monotonic() - self._oldest_done if self._done else 0.0

    def drop(self, group_ids: Collection[int]) -> list[Key]:
        """Forgets groups that are closed, given back or lost; returns their lines that the runner still works on."""
        gone = set(group_ids)
        with self._lock:
            for group_id in gone:
                self._leases.pop(group_id, None)
            self._waiting = deque(line for line in self._waiting if line.group_id not in gone)
            self._done = [outcome for outcome in self._done if outcome.group_id not in gone]
            keys = [key for key, line in self._running.items() if line.group_id in gone]
            for key in keys:
                del self._running[key]
            return keys
