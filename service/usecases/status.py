"""A batch as it stands: progress and the charge so far. Reads only; a GET never writes money."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from service.billing.price_book import exact_dollars
from service.billing.reports import acceptance_length
from service.domain.job import Batch, BatchStatus, InputError
from service.domain.usage import Work
from service.ports import Database, Page, UnitOfWork
from service.usecases.starts import LOADED_WITHIN
from service.usecases.submit import owned_batch

WORKER_ALIVE = timedelta(minutes=1)
KEEP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """`tokens_per_second` and `eta_seconds` only while the batch runs, `acceptance_length` once a line was delivered."""

    lines_done: int
    tokens_per_second: float | None = None
    eta_seconds: int | None = None
    acceptance_length: float | None = None


@dataclass(frozen=True, slots=True)
class BatchView:
    """`amount`: dollars charged so far, an exact decimal string."""

    batch: Batch
    progress: Progress
    amount: str


@dataclass(frozen=True, slots=True)
class _Totals:
    femto_dollars: int = 0
    work: Work = field(default_factory=Work)
    commit_no: int = 0
    read_at: float = 0.0


class BatchViews:
    """Builds views. Keeps the sums over a batch's lines until its next commit, so that polling does not add them up again.

    A correction of the bill is no commit of results: sums are kept for `KEEP_SECONDS` at most.
    """

    def __init__(self, *, remembered: int = 1000, clock: Callable[[], float] = time.monotonic) -> None:
        self._remembered = remembered
        self._clock = clock
        self._totals: OrderedDict[str, _Totals] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, database: Database, project_id: str, batch_id: str) -> BatchView:
        """Raises NotFound as `owned_batch` does."""
        with database.begin() as uow:
            return self._of(uow, [owned_batch(uow, project_id, batch_id)])[0]

    def page(self, database: Database, project_id: str, *, after: str | None, limit: int) -> Page[BatchView]:
        """Newest first. Raises InvalidRequest where `after` names no batch of the project."""
        with database.begin() as uow:
            page = uow.batches.page(project_id, after=after, limit=limit)
            return Page(self._of(uow, page.items), page.has_more)

    def of(self, database: Database, batch: Batch) -> BatchView:
        """The view of a batch that was just read or made."""
        with database.begin() as uow:
            return self._of(uow, [batch])[0]

    def _of(self, uow: UnitOfWork, batches: Sequence[Batch]) -> list[BatchView]:
        running = [batch.id for batch in batches if batch.status is BatchStatus.IN_PROGRESS]
        workers = uow.workers.live(WORKER_ALIVE) if running else ()
        obstacles = uow.loads.obstacles(running, LOADED_WITHIN) if running else {}
        views = []
        for batch in batches:
            totals = self._of_lines(uow, batch)
            if obstacles.get(batch.id):
                batch = _hindered(batch, obstacles[batch.id])
            speed = sum(worker.tokens_per_second for worker in workers if worker.model == batch.model)
            views.append(BatchView(batch, progress(batch, totals.work, uow.now.timestamp(), speed), exact_dollars(totals.femto_dollars)))
        return views

    def _of_lines(self, uow: UnitOfWork, batch: Batch) -> _Totals:
        if batch.commit_no == 0:
            return _Totals()
        now = self._clock()
        with self._lock:
            totals = self._totals.get(batch.id, _Totals())
        if totals.commit_no != batch.commit_no or now - totals.read_at > KEEP_SECONDS:
            totals = _Totals(uow.ledger.batch_total(batch.id).total, uow.results.work(batch.id), batch.commit_no, now)
            with self._lock:
                self._totals[batch.id] = totals
                self._totals.move_to_end(batch.id)
                while len(self._totals) > self._remembered:
                    self._totals.popitem(last=False)
        return totals


def _hindered(batch: Batch, obstacles: Sequence[tuple[str, str]]) -> Batch:
    """The batch with an error for each model that it waits for and that was refused; gone once a worker could load it."""
    errors = [
        InputError("model_unavailable", f"The model {model!r} could not be loaded and is tried again: {error}", param="model")
        for model, error in obstacles
    ]
    return batch.evolve(errors=(*batch.errors, *errors))


def progress(batch: Batch, work: Work, now: float, tokens_per_second: float) -> Progress:
    """Pure. The ETA assumes that the remaining lines take as long as the finished ones did; `now` is database time in seconds."""
    done = batch.completed + batch.failed
    acceptance = acceptance_length(work)
    if batch.status is not BatchStatus.IN_PROGRESS or batch.in_progress_at is None:
        return Progress(done, acceptance_length=acceptance)
    eta = None
    if done:
        elapsed = max(now - batch.in_progress_at.timestamp(), 0.0)
        eta = round(elapsed * (batch.total - done) / done)
    return Progress(done, round(tokens_per_second, 1), eta, acceptance)
