"""The line store on PostgreSQL: what was staged comes back, in the order promised, and attempts are counted."""

import pytest

from service.adapters.memory import MemoryBlobStore
from service.domain.line import LineOutcome, Outcome, PlannedGroup, Segment, StagedLine
from tests.integration.intake import LEASE, Intake

ODD_IDS = ["tab\there", "line\nbreak", "back\\slash", "\\N", "ünïcode\u2028", '"quoted"']


@pytest.fixture
def database(module_database):
    return module_database


@pytest.fixture
def intake(module_database):
    return Intake(module_database, MemoryBlobStore())


@pytest.fixture
def batch(intake):
    return intake.submit(b"")


def line(line_no, custom_id="x", model="m", prefix=b"", expected=1):
    return StagedLine(line_no, line_no * 10, 9, custom_id, model, prefix, expected)


def grouping(database, batch):
    with database.begin() as uow:
        return list(uow.lines.for_grouping(batch.id))


def test_staged_lines_come_back_as_they_were(database, batch):
    staged = [line(n, custom_id) for n, custom_id in enumerate(ODD_IDS, 1)]
    staged.append(StagedLine(99, 2**40, 2**31 - 1, None, None, bytes(range(48)), 2**31 - 1))
    with database.begin() as uow:
        uow.lines.stage(batch.id, staged[:3])
        uow.lines.stage(batch.id, [])
        uow.lines.stage(batch.id, staged[3:])
    assert sorted(grouping(database, batch), key=lambda staged: staged.line_no) == staged


def test_the_order_of_grouping(database, batch):
    staged = [
        line(1, model="b"),
        line(2, model="a", prefix=b"\x02"),
        line(3, model="a", prefix=b"\x01", expected=5),
        line(4, model="a", prefix=b"\x01", expected=9),
        line(5, model="a", prefix=b"\x01", expected=5),
        line(6, model="B"),
    ]
    with database.begin() as uow:
        uow.lines.stage(batch.id, staged)
    assert [staged.line_no for staged in grouping(database, batch)] == [6, 4, 3, 5, 2, 1]


def test_duplicates_name_the_first_line_and_leave_null_alone(database, batch):
    ids = ["a", "b", "a", None, "B", "a", None, "b"]
    with database.begin() as uow:
        uow.lines.stage(batch.id, [line(n, custom_id) for n, custom_id in enumerate(ids, 1)])
    with database.begin() as uow:
        assert list(uow.lines.duplicates(batch.id)) == [(3, 1, "a"), (6, 1, "a"), (8, 2, "b")]


def test_other_batches_are_not_seen(intake, database, batch):
    other = intake.submit(b"")
    with database.begin() as uow:
        uow.lines.stage(batch.id, [line(1, "a")])
        uow.lines.stage(other.id, [line(1, "a"), line(2, "b")])
    with database.begin() as uow:
        assert list(uow.lines.duplicates(other.id)) == []
        uow.lines.clear(batch.id)
    assert grouping(database, batch) == []
    assert len(grouping(database, other)) == 2


def test_statements_may_run_while_lines_are_streamed(database, batch):
    with database.begin() as uow:
        uow.lines.stage(batch.id, [line(n, f"c{n}") for n in range(1, 5001)])
        stream = uow.lines.for_grouping(batch.id)
        first = next(stream)
        assert uow.batches.load(batch.id).id == batch.id
        assert first.line_no == 1
        assert sum(1 for _ in stream) == 4999


def test_lines_with_a_result_are_not_pending(database, batch):
    with database.begin() as uow:
        uow.lines.stage(batch.id, [line(n, f"c{n}") for n in (1, 2, 3)])
        uow.groups.plan(batch.id, [PlannedGroup("m", (3, 1), 2), PlannedGroup("m", (2,), 1)])
        done = LineOutcome(batch.id, 1, None, "c1", Outcome.REJECTED, 400, {"error": {}})
        uow.results.add(Segment(f"segments/{batch.id}/x", batch.id, 10, "00"), [(done, 0, 10)], 1)
        ids = group_ids(uow, batch)
        pending = uow.lines.pending(ids)
        assert sorted((p.line_no, p.custom_id, p.offset, p.length, p.attempts) for p in pending) == [
            (2, "c2", 20, 9, 0),
            (3, "c3", 30, 9, 0),
        ]
        assert [(p.group_id, p.line_no) for p in pending] == sorted((p.group_id, p.line_no) for p in pending)
        assert uow.lines.pending(ids[:1])[0].group_id == ids[0]
        assert uow.lines.pending([]) == []
    assert [staged.line_no for staged in grouping(database, batch)] == [2, 3]


def test_attempts_are_counted_and_taken_back(database, batch):
    keys = [(batch.id, n) for n in (1, 2, 3)]
    with database.begin() as uow:
        uow.lines.stage(batch.id, [line(n, f"c{n}") for n in (1, 2, 3)])
        uow.groups.plan(batch.id, [PlannedGroup("m", (1, 2, 3), 3)])
        uow.lines.admit(keys)
        uow.lines.admit(keys[:2])
        uow.lines.acquit(keys[1:])
        uow.lines.acquit(keys[2:])  # never below zero
        uow.lines.admit([])
        attempts = {p.line_no: p.attempts for p in uow.lines.pending(group_ids(uow, batch))}
    assert attempts == {1: 2, 2: 1, 3: 0}


def test_clear_forgets_lines_groups_and_results(database, batch):
    with database.begin() as uow:
        uow.lines.stage(batch.id, [line(1, "a"), line(2, "b")])
        uow.groups.plan(batch.id, [PlannedGroup("m", (1,), 2)])
        refused = LineOutcome(batch.id, 2, None, "b", Outcome.REJECTED, 400, {"error": {}})
        uow.results.add(Segment(f"segments/{batch.id}/y", batch.id, 10, "00"), [(refused, 0, 10)], 1)
    with database.begin() as uow:
        uow.lines.clear(batch.id)
    with database.begin() as uow:
        assert list(uow.results.in_order(batch.id)) == []
        assert uow.results.segments(batch.id) == []
        assert uow.watch.open_in(batch.id) == 0
        uow.lines.stage(batch.id, [line(1, "a")])


def group_ids(uow, batch):
    leases = uow.groups.claim("w", model="m", lease=LEASE, max_lines=10_000)
    leases = [*leases, *uow.groups.claim("w", model="m", lease=LEASE, max_lines=10_000)]
    return sorted(lease.group_id for lease in leases if lease.batch_id == batch.id)
