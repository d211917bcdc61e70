"""Validation as a promise kept: after a crash at any point, against a cancel at any point, and only by the newest claimant."""

import tracemalloc
from contextlib import contextmanager
from datetime import timedelta

import pytest

from service.adapters.memory import MemoryBlobStore
from service.domain.job import BatchStatus, OnInvalidLine
from service.errors import BlobCorrupt, LeaseLost
from service.ports import OutboxKind
from service.usecases import validate
from tests.bad_input import MODEL, body, good
from tests.integration.intake import LEASE, Intake

SKIP = OnInvalidLine.SKIP

MIXED = b"\n".join(
    [
        good("a"),
        b"not json",
        good("b", body=body(model="other")),
        good("a"),
        good("c", body=body(model="gpt-4o-mini")),
        b"",
        good("d"),
        good("a"),
        good("e"),
    ]
)
"""Nine lines of two models: 2 and 6 are bad, 4 and 8 repeat line 1."""


class Interruption(Exception):
    """Stands for the death of the process."""


class Tripwire:
    """A database that calls `action` when its `at`-th transaction is about to begin."""

    def __init__(self, inner, at, action):
        self.inner, self.at, self.action, self.begun = inner, at, action, 0

    @contextmanager
    def begin(self):
        self.begun += 1
        if self.begun == self.at:
            self.action()
        with self.inner.begin() as uow:
            yield uow


@pytest.fixture
def intake(database, monkeypatch):
    monkeypatch.setattr(validate, "CHUNK_LINES", 2)
    return Intake(database, MemoryBlobStore())


@pytest.fixture
def expected(intake):
    """What an undisturbed validation of MIXED leaves behind."""
    batch = intake.run(MIXED, SKIP)
    return seen(intake, batch)


def seen(intake, batch):
    now = intake.load(batch)
    results = {n: line.body["error"]["code"] for n, line in intake.results(batch).items()}
    return now.status, now.total, now.failed, now.model, intake.lines_to_run(batch), results, groups(intake, batch)


def groups(intake, batch):
    """Line numbers by group, in group order."""
    with intake.database.begin() as uow:
        leases = uow.groups.claim("w", model=None, lease=LEASE, max_lines=1000)
        leases = [*leases, *uow.groups.claim("w", model=None, lease=LEASE, max_lines=1000)]
        mine = [lease for lease in leases if lease.batch_id == batch.id]
        pending = uow.lines.pending([lease.group_id for lease in mine])
        uow.groups.release({lease.group_id: lease.token for lease in leases})
    return sorted((lease.model, [line.line_no for line in pending if line.group_id == lease.group_id]) for lease in mine)


def test_lines_models_groups_and_results(expected):
    status, total, failed, model, to_run, results, groups = expected
    assert (status, total, failed, model) == (BatchStatus.IN_PROGRESS, 9, 4, MODEL)
    assert sorted(to_run) == [1, 3, 5, 7, 9]
    assert results == {2: "invalid_json_line", 4: "duplicate_custom_id", 6: "invalid_json_line", 8: "duplicate_custom_id"}
    assert groups == [("other", [3]), (MODEL, [1, 5, 7, 9])]


def test_workers_of_every_model_are_woken(intake):
    batch = intake.submit(MIXED, SKIP)
    intake.validate(intake.claim(batch))
    with intake.database.begin() as uow:
        wakes = uow.outbox.claim("look", kinds=[OutboxKind.WAKE], lease=timedelta(seconds=1), limit=1000)
    assert {"other", MODEL} <= {item.payload["model"] for item in wakes}
    assert intake.promised(batch) == set()


def test_a_crash_before_any_transaction_is_recovered(intake, expected):
    for at in range(1, 100):
        batch = intake.submit(MIXED, SKIP)
        item = intake.claim(batch)
        wire = Tripwire(intake.database, at, lambda: raise_(Interruption()))
        try:
            validate_through(intake, wire, item)
        except Interruption:
            with intake.database.begin() as uow:
                uow.outbox.retry(item, error="died", delay=timedelta(0))
            intake.validate(intake.claim(batch))
            assert seen(intake, batch) == expected
        else:
            break
    assert at > 8, "every transaction of the validation was interrupted once"


@pytest.mark.parametrize("status", [BatchStatus.CANCELLING, BatchStatus.FINALIZING])
def test_a_cancel_or_expiry_before_any_transaction_is_noticed(intake, status):
    for at in range(1, 100):
        batch = intake.submit(MIXED, SKIP)
        item = intake.claim(batch)
        wire = Tripwire(intake.database, at, lambda batch=batch: end(intake, batch, status))
        validate_through(intake, wire, item)
        if wire.begun < at:
            break
        now = intake.load(batch)
        assert (now.status, now.in_progress_at) == (status, None)
        assert groups(intake, batch) == []
        assert intake.promised(batch) == set(), "the validate item is done"
    assert at > 8


def test_only_the_newest_claimant_writes(intake, expected):
    batch = intake.submit(MIXED, SKIP)
    with intake.database.begin() as uow:
        old = next(i for i in uow.outbox.claim("a", kinds=[OutboxKind.VALIDATE], lease=timedelta(0), limit=99) if i.batch_id == batch.id)
    new = intake.claim(batch)
    with pytest.raises(LeaseLost):
        intake.validate(old)
    intake.validate(new)
    assert seen(intake, batch) == expected


def test_a_claimant_overtaken_in_the_middle_stops(intake, expected):
    for at in range(2, 100):
        batch = intake.submit(MIXED, SKIP)
        with intake.database.begin() as uow:
            old = next(
                i for i in uow.outbox.claim("a", kinds=[OutboxKind.VALIDATE], lease=timedelta(0), limit=99) if i.batch_id == batch.id
            )
        wire = Tripwire(intake.database, at, lambda batch=batch: intake.validate(intake.claim(batch)))
        try:
            validate_through(intake, wire, old)
        except LeaseLost:
            assert seen(intake, batch) == expected
        else:
            break
    assert at > 8


def test_a_cancel_while_groups_are_planned_undoes_the_plan(intake, monkeypatch):
    batch = intake.submit(MIXED, SKIP)
    original = validate.plan_groups

    def planning(lines, max_lines):
        end(intake, batch, BatchStatus.CANCELLING)
        return original(lines, max_lines=max_lines)

    monkeypatch.setattr(validate, "plan_groups", planning)
    intake.validate(intake.claim(batch))
    assert intake.load(batch).status is BatchStatus.CANCELLING
    assert groups(intake, batch) == []
    assert intake.promised(batch) == set()


def test_a_crash_while_groups_are_planned_undoes_the_plan(intake, monkeypatch, expected):
    batch = intake.submit(MIXED, SKIP)
    item = intake.claim(batch)
    original = validate.plan_groups
    with monkeypatch.context() as patch:
        patch.setattr(validate, "plan_groups", lambda lines, max_lines: dying(original(lines, max_lines=max_lines)))
        with pytest.raises(Interruption):
            intake.validate(item)
    assert intake.load(batch).status is BatchStatus.VALIDATING
    with intake.database.begin() as uow:
        uow.outbox.retry(item, error="died", delay=timedelta(0))
    intake.validate(intake.claim(batch))
    assert seen(intake, batch) == expected


def dying(plan):
    yield next(iter(plan))
    raise Interruption


def test_all_lines_bad_in_skip_mode_goes_straight_to_the_end(intake):
    batch = intake.run(b"bad\nworse\n[]\n", SKIP)
    assert (batch.status, batch.outcome, batch.total, batch.failed) == (BatchStatus.FINALIZING, BatchStatus.COMPLETED, 3, 3)
    assert set(intake.results(batch)) == {1, 2, 3}
    assert intake.promised(batch) == {OutboxKind.FINALIZE}


def test_a_changed_input_object_is_retried_and_then_reported(intake):
    batch = intake.submit(good("a") + b"\n")
    with intake.database.begin() as uow:
        file = uow.files.get(batch.project_id, batch.input_file_id)
    intake.blobs.put(file.storage_key, good("b") + b"\n")
    for _ in range(validate.UNREADABLE_ATTEMPTS - 1):
        item = intake.claim(batch)
        with pytest.raises(BlobCorrupt):
            intake.validate(item)
        with intake.database.begin() as uow:
            uow.outbox.retry(item, error="corrupt", delay=timedelta(0))
    intake.validate(intake.claim(batch))
    now = intake.load(batch)
    assert now.status is BatchStatus.FAILED
    assert now.errors[0].code == "input_file_unreadable"


def test_a_deleted_input_fails_the_batch(intake):
    batch = intake.submit(good("a"))
    with intake.database.begin() as uow:
        uow.files.delete(batch.project_id, batch.input_file_id)
    intake.validate(intake.claim(batch))
    assert [error.code for error in intake.load(batch).errors] == ["input_file_not_found"]


def test_the_lease_is_renewed_while_bytes_arrive(intake, monkeypatch):
    intake.lease = timedelta(microseconds=3)  # a third of it has passed at every look
    batch = intake.submit(b"\n".join(good(f"c{n}") for n in range(9)))
    item = intake.claim(batch)
    renewed = []
    original = type(intake.database).begin

    @contextmanager
    def watching(self):
        with original(self) as uow:
            renew = uow.outbox.renew
            uow.outbox.renew = lambda item, lease: (renewed.append(lease), renew(item, lease))[1]
            yield uow

    monkeypatch.setattr(type(intake.database), "begin", watching)
    intake.validate(item)
    assert renewed
    assert set(renewed) == {intake.lease}


def test_long_lines_are_not_kept(database):
    intake = Intake(database, MemoryBlobStore())
    batch = intake.submit(b"\n".join(good(f"c{n}", body=body(user="x" * 1_000_000)) for n in range(40)))
    item = intake.claim(batch)
    tracemalloc.start()
    intake.validate(item)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert intake.load(batch).total == 40
    assert peak < 25_000_000, "some lines of 1 MB, not 40"


def raise_(error):
    raise error


def validate_through(intake, wire, item):
    real, intake.database = intake.database, wire
    try:
        intake.validate(item)
    finally:
        intake.database = real


def end(intake, batch, status):
    with intake.database.begin() as uow:
        now = uow.batches.load(batch.id, lock=True)
        if now.status is BatchStatus.VALIDATING:
            changes = {"outcome": BatchStatus.EXPIRED} if status is BatchStatus.FINALIZING else {}
            uow.batches.save(now.to(status, uow.now, **changes))
