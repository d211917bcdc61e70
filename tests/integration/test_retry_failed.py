"""A retry sends exactly the lines that brought no answer, byte for byte, in a batch linked to the first."""

import pytest

from service.adapters.memory import MemoryBlobStore
from service.domain.job import BatchStatus, OnInvalidLine
from service.domain.line import LineOutcome, Outcome, Segment
from service.domain.result_lines import pack_results
from service.domain.usage import Usage
from service.errors import Conflict, InvalidRequest, NotFound
from service.ports import OutboxKind
from service.usecases import retry_failed as module
from service.usecases.keys import Caller
from service.usecases.retry_failed import retry_failed
from tests.bad_input import good
from tests.integration.intake import LEASE, Intake

LINES = [good("a"), b'{"custom_id": "odd  spacing",' + good("b")[len(b'{"custom_id":"b",') :], good("c"), b"broken", good("d")]


@pytest.fixture
def intake(module_database):
    return Intake(module_database, MemoryBlobStore())


@pytest.fixture
def caller(intake):
    return Caller(intake.project.id, None, ("all",))


def finish(intake, batch, outcomes, status=BatchStatus.COMPLETED):
    """Delivers outcomes by line number and ends the batch, as worker and finaliser would."""
    results = []
    for line_no, outcome in outcomes.items():
        answered = outcome is not Outcome.FAILED
        code = {Outcome.SUCCEEDED: 200, Outcome.REJECTED: 400}.get(outcome)
        results.append(
            LineOutcome(batch.id, line_no, None, f"c{line_no}", outcome, code, {"x": 1} if answered else None, "code", "message")
        )
    data, placed = pack_results(results)
    key = f"segments/{batch.id}/test.jsonl"
    intake.blobs.put(key, data)
    succeeded = sum(outcome is Outcome.SUCCEEDED for outcome in outcomes.values())
    with intake.database.begin() as uow:
        commit_no = uow.batches.count(batch.id, completed=succeeded, failed=len(outcomes) - succeeded, usage=Usage())
        uow.results.add(Segment(key, batch.id, len(data), "00"), placed, commit_no)
    with intake.database.begin() as uow:
        if status is BatchStatus.COMPLETED:
            ending = uow.batches.load(batch.id).to(BatchStatus.FINALIZING, uow.now, outcome=status)
        else:
            ending = uow.batches.load(batch.id).to(BatchStatus.CANCELLING, uow.now)
        uow.batches.save(ending.to(status, uow.now))


def content(intake, batch):
    with intake.database.begin() as uow:
        file = uow.files.get(batch.project_id, batch.input_file_id)
    with intake.blobs.open(file.storage_key) as stream:
        data = stream.read()
    assert len(data) == file.bytes
    return data


@pytest.mark.parametrize("skip_bytes", [0, 4 << 20], ids=["reopening at gaps", "reading over gaps"])
def test_failed_rejected_and_missing_lines_are_sent_again(intake, caller, monkeypatch, skip_bytes):
    monkeypatch.setattr(module, "SKIP_BYTES", skip_bytes)
    parent = intake.submit(b"\r\n".join(LINES), OnInvalidLine.SKIP, metadata={"job": "7"}, priority=3)
    intake.validate(intake.claim(parent))  # line 4 is refused
    finish(intake, parent, {1: Outcome.SUCCEEDED, 2: Outcome.FAILED, 3: Outcome.SUCCEEDED}, BatchStatus.CANCELLED)  # 5 never ran

    child = retry_failed(parent.id, caller=caller, database=intake.database, blobs=intake.blobs)

    assert content(intake, child) == b"".join(LINES[n] + b"\n" for n in (1, 3, 4))
    assert (child.parent_batch_id, child.status, child.metadata, child.priority) == (parent.id, BatchStatus.VALIDATING, {"job": "7"}, 3)
    assert child.expires_at - child.created_at == parent.expires_at - parent.created_at
    assert intake.load(child) == child
    intake.validate(intake.claim(child))
    assert sorted(intake.lines_to_run(child)) == [1, 3]


def test_a_batch_that_has_not_ended_is_refused(intake, caller):
    parent = intake.run(good("a"))
    with pytest.raises(Conflict, match="in_progress"):
        retry_failed(parent.id, caller=caller, database=intake.database, blobs=intake.blobs)


def test_a_batch_that_failed_validation_is_refused(intake, caller):
    parent = intake.run(b"broken")
    with pytest.raises(Conflict, match="failed validation"):
        retry_failed(parent.id, caller=caller, database=intake.database, blobs=intake.blobs)


def test_nothing_to_retry(intake, caller):
    parent = intake.run(good("a"))
    finish(intake, parent, {1: Outcome.SUCCEEDED})
    with pytest.raises(InvalidRequest, match="no failed lines") as refused:
        retry_failed(parent.id, caller=caller, database=intake.database, blobs=intake.blobs)
    assert refused.value.code == "nothing_to_retry"


def test_someone_elses_batch_answers_like_an_unknown_one(intake, caller):
    parent = intake.run(good("a"))
    finish(intake, parent, {1: Outcome.FAILED})
    stranger = Caller(Intake(intake.database, intake.blobs).project.id, None, ("all",))
    messages = []
    for who, batch_id in ((stranger, parent.id), (caller, "batch_unknown")):
        with pytest.raises(NotFound) as missing:
            retry_failed(batch_id, caller=who, database=intake.database, blobs=intake.blobs)
        messages.append(str(missing.value))
    assert messages[0] == messages[1]


def test_a_deleted_input_cannot_be_retried(intake, caller):
    parent = intake.run(good("a"))
    finish(intake, parent, {1: Outcome.FAILED})
    with intake.database.begin() as uow:
        uow.files.delete(parent.project_id, parent.input_file_id)
    with pytest.raises(NotFound, match="input file"):
        retry_failed(parent.id, caller=caller, database=intake.database, blobs=intake.blobs)


def test_a_blind_repeat_gets_the_first_answer_and_a_deliberate_one_a_second_batch(intake, caller):
    parent = intake.run(good("a"))
    finish(intake, parent, {1: Outcome.FAILED})
    again = {"caller": caller, "database": intake.database, "blobs": intake.blobs}
    first = retry_failed(parent.id, **again)
    assert retry_failed(parent.id, blind_repeat=True, **again).id == first.id
    assert retry_failed(parent.id, **again).id != first.id
    with intake.database.begin() as uow:
        items = uow.outbox.claim("look", kinds=[OutboxKind.VALIDATE], lease=LEASE, limit=1000)
    assert first.id in {item.batch_id for item in items}
