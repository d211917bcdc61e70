"""The last step before the engine: a line's body is read, its attempt is counted, and then the runner may have it.

The order matters: if the process dies on a line, the database already knows that the line was in the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

import orjson
import structlog

from service.domain.line import GroupLease, LineOutcome, LineWork, Outcome, PendingLine
from service.errors import BlobCorrupt, BlobNotFound
from service.ports import Database
from service.usecases.caps import CapGate, never_run
from service.usecases.holdings import Holdings
from service.usecases.inputs import InputFiles

ADMIT_LINES = 16
"""Lines whose attempts are counted by one statement: also how many innocents are under suspicion with a line that kills."""
MAX_ATTEMPTS = 3
"""The last one was alone: a line that killed a worker then is given up."""
CAP_PAUSE = 0.1
"""Seconds until lines are looked at again that wait for others of their batch to settle below their worst case."""
INPUT_RETRY = timedelta(seconds=15)
"""How long a group rests whose input could not be read."""

log = structlog.get_logger(__name__)


class Admission:
    """Turns waiting lines into work, a few at a time. Belongs to the runner's thread."""

    def __init__(self, database: Database, holdings: Holdings, inputs: InputFiles, gate: CapGate) -> None:
        self._database = database
        self._holdings = holdings
        self._inputs = inputs
        self._gate = gate
        self.not_before = 0.0
        """Monotonic time before which the caller should not ask again (set after an outage, too)."""

    def admit(self, lose: Callable[[Collection[int]], None]) -> Sequence[LineWork]:
        """The next lines, their attempts counted. `lose` is told of groups that are someone else's by now.

        Raises:
            Unavailable: database or object store do not answer; the lines wait again.
        """
        lines = self._holdings.take(ADMIT_LINES)
        try:
            works = [work for line in lines if (work := self._work(line)) is not None]
            if works:
                works = self._count(works, lose)
        except BaseException:
            self._holdings.put_back(lines)
            raise
        return works

    def _work(self, line: PendingLine) -> LineWork | None:
        """None where the line is settled without the engine, or its input cannot be read."""
        lease = self._holdings.lease_of(line)
        if lease is None:
            return None
        if lease.suspect and line.attempts >= MAX_ATTEMPTS:
            self._holdings.finish(_given_up(line))
            return None
        try:
            data = self._inputs.read(lease.input_key, lease.input_sha256, line.offset, line.length)
        except (BlobNotFound, BlobCorrupt) as error:
            log.error("input_unreadable", batch_id=lease.batch_id, error=error.message)  # noqa: TRY400 - an expected error
            self._rest(lease)
            return None
        return LineWork(
            batch_id=line.batch_id,
            line_no=line.line_no,
            group_id=line.group_id,
            custom_id=line.custom_id,
            model=lease.model,
            endpoint=lease.endpoint,
            body=orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))["body"],
            priority=lease.priority,
            deadline=lease.expires_at.timestamp(),
            drafter=lease.drafter,
            task=lease.task,
        )

    def _count(self, works: list[LineWork], lose: Callable[[Collection[int]], None]) -> list[LineWork]:
        tokens = self._holdings.tokens
        asked = {work.group_id: tokens[work.group_id] for work in works if work.group_id in tokens}
        leases = self._holdings.leases
        with self._database.begin() as uow:
            held = uow.groups.lock_held(asked)
            ours = [(work, leases[work.group_id]) for work in works if work.group_id in held and work.group_id in leases]
            run, wait, out = self._gate.verdicts(uow, ours)
            uow.lines.admit([work.key for work in run])
        if lost := set(asked) - held:
            lose(lost)
        for work in out:
            self._holdings.finish(never_run(work))
        if wait:
            self._holdings.defer([work.key for work in wait])
            if not run:
                self.not_before = time.monotonic() + CAP_PAUSE
        return run

    def _rest(self, lease: GroupLease) -> None:
        self._holdings.drop([lease.group_id])
        with self._database.begin() as uow:
            uow.groups.release({lease.group_id: lease.token}, delay=INPUT_RETRY)


def _given_up(line: PendingLine) -> LineOutcome:
    return LineOutcome(
        batch_id=line.batch_id,
        line_no=line.line_no,
        group_id=line.group_id,
        custom_id=line.custom_id,
        outcome=Outcome.FAILED,
        error_code="worker_crashed",
        error_message=f"The worker died {line.attempts} times while it ran this line, at last with no other; it is not tried again.",
    )
