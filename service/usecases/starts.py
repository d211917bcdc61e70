"""What a worker's loads of models are remembered by: how long each part of a start took, and why a model was refused.

Records are for people and for the decision to give a model up; a database that does not answer costs a record and nothing else.
"""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timedelta

import structlog

from service.domain.line import GroupLease, LineOutcome, Outcome, PendingLine
from service.errors import LongdraftError, ModelUnavailable
from service.ports import Database, InferenceRunner, ModelLoad, Refusals, RunnerStats

LOADED_WITHIN = timedelta(days=1)
"""A model that any worker could load in this time is not given up: some machine of the fleet can run it."""
TRANSIENT = 10
"""Refusals that may pass (a download that failed) count this many times less than lasting ones (too little memory)."""

log = structlog.get_logger(__name__)


class Starts:
    """Books one worker's loads: `begin`, then `loaded` or `refused`; `answered` when results are committed."""

    def __init__(self, database: Database, worker_id: str, runner: InferenceRunner) -> None:
        self._database = database
        self._worker_id = worker_id
        self._runner = runner
        self.spawn_ns = 0
        """Of the process; counted with the first load."""
        self._load: ModelLoad | None = None
        self._before = RunnerStats()
        self._id: int | None = None
        self._ready_at = 0.0

    def begin(self, lease: GroupLease, claimed_at: datetime) -> None:
        self._before, self._id = self._runner.stats(), None
        spawn_ns, self.spawn_ns = self.spawn_ns, 0
        self._load = ModelLoad(self._worker_id, lease.model, lease.batch_id, claimed_at, spawn_ns=spawn_ns)

    def loaded(self) -> None:
        stats, before = self._runner.stats(), self._before
        assert self._load is not None
        load = replace(
            self._load,
            load_ns=stats.load_ns - before.load_ns,
            profile_ns=stats.profile_ns - before.profile_ns,
            profile_reused=stats.profile_reused,
        )
        log.info(
            "model_loaded",
            model=load.model,
            batch_id=load.batch_id,
            load_seconds=round(load.load_ns * 1e-9, 3),
            profile_seconds=round(load.profile_ns * 1e-9, 3),
            profile_reused=load.profile_reused,
        )
        self._note(load)
        self._ready_at = time.monotonic()

    def refused(self, error: ModelUnavailable) -> Refusals:
        """Records the refusal; returns how often the model was refused by now, this time included."""
        assert self._load is not None
        load = replace(self._load, error=error.message, lasting=error.lasting)
        log.error("model_unavailable", model=load.model, batch_id=load.batch_id, lasting=error.lasting, error=error.message)
        self._note(load)
        self._id = None
        try:
            with self._database.begin() as uow:
                return uow.loads.refusals(load.model, LOADED_WITHIN)
        except LongdraftError:
            return Refusals(0, 0)

    def answered(self) -> None:
        """Results were committed: after a load the first time counts. From the committer's thread."""
        load_id, self._id = self._id, None
        if load_id is None:
            return
        since = int((time.monotonic() - self._ready_at) * 1e9)
        prefill_ns = min(self._runner.stats().first_token_ns, since)
        try:
            with self._database.begin() as uow:
                uow.loads.answered(load_id, prefill_ns=prefill_ns, decode_ns=since - prefill_ns)
        except LongdraftError as error:
            log.warning("load_not_recorded", worker=self._worker_id, error=error.message)

    def _note(self, load: ModelLoad) -> None:
        try:
            with self._database.begin() as uow:
                self._id = uow.loads.note(load)
        except LongdraftError as error:
            log.warning("load_not_recorded", worker=self._worker_id, error=error.message)


def hopeless(refusals: Refusals, limit: int) -> bool:
    """Whether a model was refused often enough that the lines which wait for it are failed instead of kept waiting."""
    return refusals.lasting >= limit or refusals.count >= limit * TRANSIENT


def unloadable(line: PendingLine, error: ModelUnavailable) -> LineOutcome:
    """The outcome of a line whose model nobody can load."""
    return LineOutcome(
        batch_id=line.batch_id,
        line_no=line.line_no,
        group_id=line.group_id,
        custom_id=line.custom_id,
        outcome=Outcome.FAILED,
        error_code=error.code,
        error_message=f"{error.message} No worker could load the model; the line was not run and is not billed.",
    )
