"""A worker's second thread: writes finished lines out while the engine goes on computing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import structlog

from service.domain.line import GroupLease, LineOutcome, Outcome
from service.errors import Unavailable
from service.usecases.deliver import Deliverer
from service.usecases.holdings import Holdings

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between attempts while the database or the object store does not answer."""

LOGGED_LINES = 20
"""Line numbers that one event of the log names at most."""

log = structlog.get_logger(__name__)


class Committer:
    """Commits what `holdings` has done: every `every` seconds, or `lines` outcomes, whichever comes first.

    Outages are waited out; nothing is lost, since outcomes leave the holdings only into a commit that succeeded or was refused.
    `on_lost` is called with groups that turned out to be someone else's, `on_delivered` with outcomes that are committed.
    """

    def __init__(
        self,
        holdings: Holdings,
        deliverer: Deliverer,
        *,
        every: float,
        lines: int,
        on_lost: Callable[[Collection[int]], None],
        on_delivered: Callable[[Sequence[LineOutcome]], None],
    ) -> None:
        self._holdings = holdings
        self._deliverer = deliverer
        self._every = every
        self._lines = lines
        self._on_lost = on_lost
        self._on_delivered = on_delivered
        self._changed = threading.Condition()
        self._flushing = False
        self._closing = threading.Event()
        self._busy = False
        self._empty_groups: dict[int, GroupLease] = {}
        self.error: BaseException | None = None
        """What ended the thread, if anything did: the worker cannot go on then."""
        self.delivered = 0
        self.committing = threading.Lock()
        """Held during a commit's transaction, so that a renewal does not look at groups that are being closed."""
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def notify(self) -> None:
        """Something may be due; cheap enough to call for every line."""
        if self._holdings.done >= self._lines:
            with self._changed:
                self._changed.notify_all()

    def close_empty(self, leases: Collection[GroupLease]) -> None:
        """Groups whose lines all had results when they were claimed: closed with the next commit, which comes at once."""
        with self._changed:
            self._empty_groups.update({lease.group_id: lease for lease in leases})
            self._flushing = True
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Commits everything that is done now; False if that took longer than `timeout` seconds or failed."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.error is not None or not (self._flushing or self._busy), timeout)
            return self.error is None and not self._flushing and not self._busy

    def close(self) -> None:
        """Ends the thread; what is not committed by now is left to whoever gets the groups next."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                with self._changed:
                    self._changed.wait_for(self._due, timeout=self._wait())
                    if not self._due() or self._closing.is_set():
                        continue
                    outcomes = self._holdings.take_done(self._lines)
                    empty, self._empty_groups = self._empty_groups, {}
                    self._busy = True
                if outcomes or empty:
                    self._deliver(outcomes, empty)
                with self._changed:
                    self._busy = False
                    self._flushing = self._flushing and bool(self._holdings.done or self._empty_groups)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed to the worker's main thread, which ends the process
            with self._changed:
                self.error = error
                self._changed.notify_all()

    def _due(self) -> bool:
        return self._flushing or self._holdings.done >= self._lines or self._holdings.done_for() >= self._every or self._closing.is_set()

    def _wait(self) -> float:
        return max(0.01, min(self._every, self._every - self._holdings.done_for()))

    def _deliver(self, outcomes: list[LineOutcome], empty: dict[int, GroupLease]) -> None:
        leases = {**self._holdings.leases, **empty}
        pause = FIRST_PAUSE
        packed = None
        while True:
            try:
                if packed is None:
                    packed = self._deliverer.store(outcomes, leases)
                with self.committing:
                    delivery = self._deliverer.commit(packed, leases, also=empty)
                    self._holdings.drop(delivery.closed)
                break
            except Unavailable as error:
                log.warning("commit_waits", lines=len(outcomes), error=error.message, again_in=pause)
                if self._closing.wait(pause):
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
        self.delivered += delivery.delivered
        batch_ids = sorted({outcome.batch_id for outcome in outcomes})
        log.info("committed", batch_ids=batch_ids, lines=delivery.delivered, segments=len(packed), groups_closed=len(delivery.closed))
        if delivery.new:
            _log_failures(delivery.new)
            self._on_delivered(delivery.new)
        if lost := delivery.lost - delivery.closed:
            self._on_lost(lost)


def _log_failures(outcomes: Sequence[LineOutcome]) -> None:
    """Lines that could not be run, by batch and reason; a 4xx is between the customer and the model."""
    failed: dict[tuple[str, str | None], list[int]] = {}
    for outcome in outcomes:
        if outcome.outcome is Outcome.FAILED:
            failed.setdefault((outcome.batch_id, outcome.error_code), []).append(outcome.line_no)
    for (batch_id, code), line_nos in failed.items():
        log.warning("lines_failed", batch_id=batch_id, code=code, lines=len(line_nos), line_nos=line_nos[:LOGGED_LINES])
