"""A worker's pull: claims groups, feeds their lines to the runner, hands outcomes to the committer, and claims on while it runs.

The runner's thread runs `drain`; committer and heartbeat have threads and connections of their own. Nothing drains between groups:
lines of several groups and batches are in the runner at the same time.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timedelta

import structlog

from service.config import Timing
from service.domain.line import GroupLease, LineOutcome, LineWork, PendingLine
from service.errors import LongdraftError, ModelUnavailable, Unavailable
from service.ports import BlobStore, Database, InferenceRunner, UnitOfWork
from service.usecases.admission import Admission
from service.usecases.caps import CapGate
from service.usecases.committer import Committer
from service.usecases.deliver import Deliverer
from service.usecases.heartbeat import Heartbeat, WorkerIdentity
from service.usecases.holdings import Holdings
from service.usecases.inputs import InputFiles
from service.usecases.recall import Recall
from service.usecases.starts import Starts, hopeless, unloadable

ISOLATE_AT = 2
"""A line that was in the engine this often when a worker died runs alone from now on."""
MAX_UNCOMMITTED = 20
"""In commits: while outcomes cannot be written, this many pile up before the runner gets no more lines."""
CLAIM_POLL = 1.0
"""Seconds between looks for more groups while lines are running."""
FLUSH_SLICE = 0.5
"""Seconds between looks at `stop` while commits are waited for."""
CLAIM_TRIES, CLAIM_AGAIN = 4, (0.01, 0.05)
"""A claim never waits for another one that is under way; it is tried again, after so many seconds."""
OUTAGE_PAUSE = 1.0
"""Seconds until the next try of a claim or an admission that found no database."""

log = structlog.get_logger(__name__)


class GroupRunner:
    """Drains due groups with one runner, for one worker. Entering the block registers the worker; leaving it ends its threads.

    `model_refusals`: how often a model is refused before lines that wait for it fail. `age_ns`: how long the process has been running.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        *,
        database: Database,
        blobs: BlobStore,
        runner: InferenceRunner,
        timing: Timing,
        group_lines: int,
        stop: threading.Event,
        hint: threading.Event,
        model_refusals: int = 3,
        age_ns: Callable[[], int] = lambda: 0,
    ) -> None:
        self._identity = identity
        self._database = database
        self._runner = runner
        self._timing = timing
        self._lease = timedelta(seconds=timing.lease)
        self._group_lines = group_lines
        self._stop = stop
        self._hint = hint
        self._model: str | None = None
        self._waiting_suspect: Sequence[PendingLine] = ()
        self._alone = False
        self._next_claim = 0.0
        self._model_refusals = model_refusals
        self._age_ns = age_ns
        self.observe: Callable[[Sequence[LineOutcome]], None] = lambda _: None
        """Told of outcomes that were committed, from the committer's thread."""
        self._starts = Starts(database, identity.id, runner)
        self._given_up: dict[str, tuple[float, ModelUnavailable]] = {}
        """Model -> when it was found hopeless: the next groups that wait for it fail without another try, for a while."""
        self._claimed_at: datetime | None = None
        self.last_claim = time.monotonic()
        """Monotonic time of the last claim that took something; at first, of the start."""
        self._holdings = holdings = Holdings()
        self._inputs = InputFiles(blobs)
        self._committer = Committer(
            holdings,
            Deliverer(database, blobs, identity.id),
            every=timing.commit_every,
            lines=timing.commit_lines,
            on_lost=self._lose,
            on_delivered=self._delivered,
        )
        self._recall = Recall(database, blobs, runner)
        self._admission = Admission(database, holdings, self._inputs, CapGate(lambda: runner.stats().context))
        self._heartbeat = Heartbeat(
            identity, database, holdings, runner, timing, between_commits=self._committer.committing, stop=stop, on_lost=self._lose
        )

    def __enter__(self) -> GroupRunner:
        self._heartbeat.start()
        self._starts.spawn_ns = self._age_ns()
        self._committer.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._committer.close()
        self._heartbeat.close()
        self._inputs.close()

    @property
    def delivered(self) -> int:
        """Lines this worker has committed so far."""
        return self._committer.delivered

    @property
    def held(self) -> int:
        """Groups that this worker has on lease."""
        return len(self._holdings.tokens)

    @property
    def model(self) -> str | None:
        """The model that is loaded."""
        return self._model

    def drain(self) -> bool:
        """Runs until nothing is due or `stop` is set; returns whether there was anything to run.

        Raises:
            Unavailable: the database does not answer.
            Exception: whatever the runner died of. Finished lines are committed and the groups given back by then, with the attempts of
                running lines counted; the process should end.
        """
        worked = False
        while not self._stop.is_set() and self._next_groups():
            worked = True
            self._run_held()
        return worked

    # --- claims -----------------------------------------------------------------------------------------------------------------

    def _next_groups(self) -> bool:
        """Something to run: a suspect that waited for the runner to be empty, groups of the loaded model, or of any other."""
        self._alone = False
        if self._waiting_suspect:
            self._hold_suspect(self._waiting_suspect)
            return True
        return self._claim(self._model) or (self._model is not None and self._claim(None))

    def _claim(self, model: str | None) -> bool:
        """Takes due groups of a model (None: of the one with most to do). False where there are none for this worker."""
        self._hint.clear()
        for _ in range(CLAIM_TRIES):
            taken = self._claim_once(model)
            if taken is not None:
                return taken
            self._stop.wait(random.uniform(*CLAIM_AGAIN))
        return False

    def _claim_once(self, model: str | None) -> bool | None:
        """None where groups are due, but another worker's claim has its hands on them at this moment."""
        room = self._runner.capacity + self._group_lines - self._holdings.unfinished
        with self._database.begin() as uow:
            most = min(room, self._fair_share(uow, model))
            if most <= 0:
                return False
            leases = uow.groups.claim(self._identity.id, model=model, lease=self._lease, max_lines=most)
            if not leases:
                due = uow.watch.due()
                return None if (due if model is None else due.get(model)) else False
            ids = [lease.group_id for lease in leases]
            # Here, and not where a dead worker's groups are taken back, so that nobody who does that can forget it.
            isolated = uow.watch.isolate(ids, attempts=ISOLATE_AT)
            pending = uow.lines.pending(ids)
            self._claimed_at, self.last_claim = uow.now, time.monotonic()
        if isolated:
            log.warning("suspects_isolated", lines=isolated, groups=len(ids))
        self._hold(leases, pending)
        return True

    def _fair_share(self, uow: UnitOfWork, model: str | None) -> int:
        """How many more lines leave the other live workers their part of all open ones. A worker with nothing to do may always have one.

        It binds only near the end of the work; before that, what the engine can hold is less.
        """
        groups = uow.watch.due_or_leased()
        lines = (groups.get(model, 0) if model else max(groups.values(), default=0)) * self._group_lines
        others = [row for row in uow.workers.live(self._lease) if row.id != self._identity.id and row.model in (None, model)]
        held = self._holdings.unfinished
        share = -(-lines // (1 + len(others))) - held
        return share if held else max(share, 1)

    def _hold(self, leases: Sequence[GroupLease], pending: Sequence[PendingLine]) -> None:
        batch_ids = sorted({lease.batch_id for lease in leases})
        log.info("claimed", batch_ids=batch_ids, groups=len(leases), lines=len(pending), model=leases[0].model, suspect=leases[0].suspect)
        with_lines = {line.group_id for line in pending}
        if leases[0].suspect and with_lines:
            busy = self._holdings.unfinished > 0
            self._holdings.add(leases, [])
            if busy:
                self._waiting_suspect = pending
            else:
                self._hold_suspect(pending)
            return
        self._holdings.add(leases, pending)
        if empty := [lease for lease in leases if lease.group_id not in with_lines]:
            self._committer.close_empty(empty)

    def _hold_suspect(self, pending: Sequence[PendingLine]) -> None:
        """The next run is this line's alone."""
        self._alone, self._waiting_suspect = True, ()
        self._holdings.add([], pending)

    # --- one run ----------------------------------------------------------------------------------------------------------------

    def _run_held(self) -> None:
        """Loads the model of what is held and runs until nothing is left, then commits and gives back."""
        lease = next(iter(self._holdings.leases.values()), None)
        if lease is None or not self._load(lease):
            return
        self._recall.meet({held.batch_id for held in self._holdings.leases.values()})
        orderly = False
        try:
            for outcome in self._runner.run(self._feed()):
                if self._holdings.finish(outcome):
                    self._committer.notify()
            orderly = True
        finally:
            self._flush(patient=orderly)
            stopped = self._stop.is_set()
            keep = {line.group_id for line in self._waiting_suspect} if orderly and not stopped else ()
            # Lines that the runner swallowed or died of keep their attempt; those that a stop cut off were never at fault.
            self._give_back(acquit=orderly and stopped, keep=keep)
        self._check_committer()

    def _load(self, lease: GroupLease) -> bool:
        """Makes the model of what is held the loaded one. Where it is refused, the groups are given back, and once it was refused often
        enough their lines fail: a batch must not wait in silence for a model that nobody can load."""
        if lease.model == self._model:
            return True
        if (known := self._given_up.get(lease.model)) is not None and time.monotonic() - known[0] < self._timing.model_retry:
            self._fail_held(known[1])
            return False
        assert self._claimed_at is not None
        self._starts.begin(lease, self._claimed_at)
        self._model = self._heartbeat.model = None
        try:
            self._runner.load(lease.model)
        except ModelUnavailable as error:
            if hopeless(self._starts.refused(error), self._model_refusals):
                self._given_up[lease.model] = (time.monotonic(), error)
                self._fail_held(error)
            else:
                self._give_back(acquit=True, delay=timedelta(seconds=self._timing.model_retry))
            return False
        self._starts.loaded()
        self._recall.forget()
        self._model = self._heartbeat.model = lease.model
        return True

    def _fail_held(self, error: ModelUnavailable) -> None:
        for line in self._holdings.take(self._holdings.unfinished):
            self._holdings.finish(unloadable(line, error))
        self._flush(patient=True)
        self._give_back(acquit=True)

    def _delivered(self, outcomes: Sequence[LineOutcome]) -> None:
        self._starts.answered()
        self.observe(outcomes)

    def _flush(self, *, patient: bool) -> None:
        """Waits for the commits; through an outage as long as it takes, unless the process has to end."""
        started = time.monotonic()
        while not self._committer.flush(FLUSH_SLICE) and self._committer.error is None:
            if patient and not self._stop.is_set():
                started = time.monotonic()
            elif time.monotonic() - started > self._timing.shutdown_grace:
                log.warning("uncommitted_lines_left", lines=self._holdings.done)
                return

    def _feed(self) -> Iterator[LineWork | None]:
        """What the runner pulls from: lines as long as there are any, None while others still run, and an end."""
        ready: deque[LineWork] = deque()
        while not self._stop.is_set():
            self._check_committer()
            if self._holdings.done > MAX_UNCOMMITTED * self._timing.commit_lines:
                yield None
                continue
            if not ready:
                ready.extend(self._next_lines())
            if ready:
                work = ready.popleft()
                if self._holdings.is_running(work.key):
                    yield work
                continue
            if not self._holdings.unfinished:
                return
            yield None

    def _next_lines(self) -> Sequence[LineWork]:
        """Admitted lines; claims more groups first where the runner has room for them."""
        now = time.monotonic()
        try:
            if self._wants_more(now):
                self._next_claim = now + (0.0 if self._claim(self._model) else CLAIM_POLL)
            return self._admission.admit(self._lose) if now >= self._admission.not_before else ()
        except Unavailable as error:
            log.warning("claim_waits", error=error.message)
            self._next_claim = self._admission.not_before = now + OUTAGE_PAUSE
            return ()

    def _wants_more(self, now: float) -> bool:
        if self._alone or self._waiting_suspect or self._holdings.unfinished > self._runner.capacity:
            return False
        return now >= self._next_claim or self._hint.is_set()

    # --- giving back ------------------------------------------------------------------------------------------------------------

    def _give_back(self, *, acquit: bool, keep: Collection[int] = (), delay: timedelta = timedelta(0)) -> None:
        """Releases the groups that are still held, but for `keep`. `acquit`: lines that were admitted get their attempt back."""
        tokens = {group_id: token for group_id, token in self._holdings.tokens.items() if group_id not in keep}
        running = self._holdings.running
        if not tokens:
            return
        try:
            with self._committer.committing, self._database.begin() as uow:
                held = uow.groups.lock_held(tokens)
                if acquit:
                    uow.lines.acquit([(line.batch_id, line.line_no) for line in running if line.group_id in held])
                uow.groups.release({group_id: tokens[group_id] for group_id in held}, delay=delay)
                self._holdings.drop(tokens)
        except LongdraftError as error:
            log.warning("groups_not_given_back", groups=len(tokens), error=error.message)  # their leases run out
            self._holdings.drop(tokens)
        log.info("gave_back", group_ids=sorted(tokens), lines=len(running))

    def _lose(self, group_ids: Collection[int]) -> None:
        """From any thread: these groups are someone else's by now."""
        keys = self._holdings.drop(group_ids)
        log.warning("leases_lost", group_ids=sorted(group_ids), running_lines=len(keys))
        self._runner.abort(keys)

    def _check_committer(self) -> None:
        if self._committer.error is not None:
            raise RuntimeError("the committer ended") from self._committer.error
