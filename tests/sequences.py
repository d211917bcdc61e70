"""Arbitrary sequences of what can happen to jobs: submit, run, crash, retry, cancel, expire, reprice, reverse; then the bill must hold.

The real use cases on a real PostgreSQL with the stand-in engine, driven by hand: a worker can stop between any two of its steps, and one
that was given up for dead can come back and try to commit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sqlalchemy import func, update

from service.adapters.memory import MemoryBlobStore, MemoryBuckets
from service.adapters.standin import StandinRunner
from service.adapters.tables import batches
from service.config import Settings
from service.domain.job import BatchStatus, OnInvalidLine
from service.domain.line import GroupLease
from service.domain.money import Rates
from service.errors import Conflict, InvalidRequest, NotFound
from service.ports import Database, OutboxKind
from service.usecases.admission import Admission
from service.usecases.cancel import cancel_batch, expire_batch
from service.usecases.caps import CapGate
from service.usecases.corrections import reverse_charge
from service.usecases.deliver import Deliverer, PackedSegment
from service.usecases.finalize import finalize_batch
from service.usecases.holdings import Holdings
from service.usecases.inputs import InputFiles
from service.usecases.keys import Caller
from service.usecases.oracles import check
from service.usecases.retry_failed import retry_failed
from service.usecases.sweep import sweep
from tests.bad_input import MODEL, body, good
from tests.integration.intake import LEASE, Intake

ROUNDS = 50
"""After which a batch that has not ended never will."""

_names = itertools.count(1)


@dataclass
class HandDriven:
    """A worker whose steps are taken one at a time."""

    database: Database
    blobs: MemoryBlobStore
    runner: StandinRunner
    name: str = field(default_factory=lambda: f"worker-{next(_names)}")

    def __post_init__(self) -> None:
        self.holdings = Holdings()
        self.inputs = InputFiles(self.blobs)
        self.admission = Admission(self.database, self.holdings, self.inputs, CapGate(lambda: self.runner.stats().context))
        self.deliverer = Deliverer(self.database, self.blobs, self.name)
        self.stored: tuple[Sequence[PackedSegment], dict[int, GroupLease]] | None = None

    def claim(self, most: int) -> bool:
        """Takes due groups, as run_groups does."""
        with self.database.begin() as uow:
            leases = uow.groups.claim(self.name, model=None, lease=timedelta(hours=1), max_lines=most)
            ids = [lease.group_id for lease in leases]
            uow.watch.isolate(ids, attempts=2)
            pending = uow.lines.pending(ids)
        self.holdings.add(leases, pending)
        return bool(leases)

    def execute(self) -> None:
        """Admits some lines and runs them."""
        for outcome in self.runner.run(iter(self.admission.admit(self.holdings.drop))):
            self.holdings.finish(outcome)

    def store(self, limit: int) -> None:
        """Writes a segment for some of what is done; the commit may follow, or never come."""
        if self.stored is None:
            leases = dict(self.holdings.leases)
            self.stored = self.deliverer.store(self.holdings.take_done(limit), leases), leases

    def commit(self) -> int:
        if self.stored is None:
            return 0
        (packed, leases), self.stored = self.stored, None
        delivery = self.deliverer.commit(packed, leases, also=self.holdings.tokens)
        self.holdings.drop(delivery.closed | delivery.lost)
        return delivery.delivered

    def work_off(self) -> None:
        """Everything that is due, to its end."""
        while self.claim(1000) or self.holdings.tokens:
            while self.holdings.unfinished:
                self.execute()
                self.store(1000)
                self.commit()
            self.store(1000)
            self.commit()


class Sequences(RuleBasedStateMachine):
    """Bind `database` and `settings` with `machine`."""

    database: Database
    settings: Settings
    reversals = 0
    """Of all sequences together: a run that never got to one has shown nothing about them."""

    @initialize()
    def begin(self) -> None:
        self.blobs = MemoryBlobStore()
        self.intake = Intake(self.database, self.blobs, group_lines=3)
        self.caller = Caller(self.intake.project.id, "", ("all",))
        self.batches: list[str] = []
        self.alive: list[HandDriven] = []
        self.dead: list[HandDriven] = []
        self.delivered: list[tuple[str, int]] = []
        # Something to run from the start: most of what can go wrong needs a worker.
        self.submit(["good", "good", "refused", "good", "good"], skip=False, cap=None, validated=True)
        self.claim(most=3)
        self.alive[0].execute()
        self._deliver(self.alive[0], 2)

    # --- customers --------------------------------------------------------------------------------------------------------------

    @rule(
        lines=st.lists(st.sampled_from(["good", "good", "good", "refused", "bad"]), min_size=1, max_size=7),
        skip=st.booleans(),
        cap=st.none() | st.integers(1, 40_000_000_000),
        validated=st.sampled_from([True, True, False]),
    )
    def submit(self, lines: list[str], skip: bool, cap: int | None, validated: bool) -> None:
        """`refused` lines get a 400 from the endpoint, `bad` ones fail validation."""
        changes = {"good": {}, "refused": {"body": body(temperature=9)}, "bad": {"url": "/v1/nowhere"}}
        data = b"\n".join(good(f"c{number}", **changes[kind]) for number, kind in enumerate(lines, 1))
        batch = self.intake.submit(data, OnInvalidLine.SKIP if skip else OnInvalidLine.FAIL, max_cost=cap)
        self.batches.append(batch.id)
        if validated:
            self.validate()

    @rule()
    def validate(self) -> None:
        with self.database.begin() as uow:
            items = uow.outbox.claim("control", kinds=[OutboxKind.VALIDATE], lease=LEASE, limit=100)
        for item in items:
            self.intake.validate(item)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._tolerating(lambda: cancel_batch(self.database, self.caller.project_id, self._some_batch(data)))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        if len(self.batches) < 8:
            caller = Caller(self.caller.project_id, None, ("all",))  # type: ignore[arg-type]
            batch_id = self._some_batch(data)
            child = self._tolerating(lambda: retry_failed(batch_id, caller=caller, database=self.database, blobs=self.blobs))
            if child is not None:
                self.batches.append(child.id)

    # --- operator ---------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """As if the batch had been created so much earlier: its window keeps its length, and so does that of a batch that retries it."""
        batch_id = self._some_batch(data)
        with self.database.begin() as uow:
            uow.batches.load(batch_id, lock=True)
            earlier = {"created_at": batches.c.created_at - (batches.c.expires_at - func.now()), "expires_at": func.now()}
            uow.batches._connection.execute(update(batches).where(batches.c.id == batch_id).values(earlier))  # type: ignore[attr-defined]
        expire_batch(self.database, batch_id)

    @rule(rates=st.tuples(*[st.integers(0, 10**9)] * 3))
    def reprice(self, rates: tuple[int, int, int]) -> None:
        with self.database.begin() as uow:
            uow.ledger.set_prices({MODEL: Rates(*rates)})

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def reverse(self, data: st.DataObject) -> None:
        """Of any line that was delivered: charged or not, reversed already or not."""
        batch_id, line_no = data.draw(st.sampled_from(self.delivered))
        if self._tolerating(lambda: reverse_charge(self.database, batch_id, line_no)) is not None:
            type(self).reversals += 1

    # --- workers ----------------------------------------------------------------------------------------------------------------

    @rule(most=st.integers(1, 12))
    def claim(self, most: int) -> None:
        worker = HandDriven(self.database, self.blobs, StandinRunner(self.settings))
        if worker.claim(most):
            self.alive.append(worker)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def execute(self, data: st.DataObject) -> None:
        self._some_worker(data).execute()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), limit=st.integers(1, 5), committed=st.booleans())
    def deliver(self, data: st.DataObject, limit: int, committed: bool) -> None:
        worker = self._some_worker(data)
        if committed:
            self._deliver(worker, limit)
        else:
            worker.store(limit)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), stored=st.booleans())
    def give_up_for_dead(self, data: st.DataObject, stored: bool) -> None:
        """It may be dead, or only stopped, before or after it wrote a segment: then it comes back as a zombie."""
        worker = self._some_worker(data)
        if stored:
            worker.store(100)
        self.alive.remove(worker)
        self.dead.append(worker)
        with self.database.begin() as uow:
            uow.watch.take_back_worker(worker.name)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def zombie(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.dead))
        worker.store(100)
        assert worker.commit() == 0, "a worker whose leases were taken back delivered something"

    @rule()
    def finalize(self) -> None:
        with self.database.begin() as uow:
            items = uow.outbox.claim("control", kinds=[OutboxKind.FINALIZE], lease=LEASE, limit=100)
        for item in items:
            finalize_batch(item, database=self.database, blobs=self.blobs, buckets=MemoryBuckets())

    # --- the end ----------------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Whatever is left is brought to its end; then every oracle must hold of every batch."""
        if not hasattr(self, "batches"):
            return
        try:
            self.settle()
        finally:
            for worker in (*self.alive, *self.dead):
                worker.inputs.close()

    def settle(self) -> None:
        with self.database.begin() as uow:
            for worker in self.alive:
                uow.watch.take_back_worker(worker.name)
        last = HandDriven(self.database, self.blobs, StandinRunner(self.settings))
        for _ in range(ROUNDS):
            self.validate()
            last.work_off()
            sweep(self.database)
            self.finalize()
            if self._all_ended():
                break
        last.inputs.close()
        for batch_id in self.batches:
            with self.database.begin() as uow:
                batch = uow.batches.load(batch_id)
                total = uow.ledger.batch_total(batch_id).total
            assert batch.status.terminal, f"{batch.status} for ever"
            assert batch.max_cost is None or total <= batch.max_cost
            assert [str(violation) for violation in check(self.database, self.blobs, batch_id)] == []
            assert batch.status is BatchStatus.FAILED or batch.completed + batch.failed == batch.total

    def _deliver(self, worker: HandDriven, limit: int) -> None:
        worker.store(limit)
        assert worker.stored is not None
        placed = [(outcome.batch_id, outcome.line_no) for part in worker.stored[0] for outcome, _, _ in part.placed]
        if worker.commit():
            self.delivered.extend(placed)

    def _all_ended(self) -> bool:
        with self.database.begin() as uow:
            return all(uow.batches.load(batch_id).status.terminal for batch_id in self.batches)

    def _some_worker(self, data: st.DataObject) -> HandDriven:
        return data.draw(st.sampled_from(self.alive))

    def _some_batch(self, data: st.DataObject) -> str:
        return str(data.draw(st.sampled_from(self.batches)))

    def _tolerating(self, act: Callable[[], Any]) -> Any:
        """Refusals are answers, too."""
        try:
            return act()
        except (Conflict, InvalidRequest, NotFound):
            return None


def machine(on: Database, using: Settings) -> type[Sequences]:
    """The state machine on a database that nothing else uses."""

    class Bound(Sequences):
        database = on
        settings = using

    return Bound
