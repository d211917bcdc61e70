"""Bad file content, through the whole of intake on a real database: what fails a batch, what is skipped, what is accepted."""

import pytest

from service.adapters.memory import MemoryBlobStore
from service.config import Limits
from service.domain.job import BatchStatus, OnInvalidLine
from tests.bad_input import ACCEPTED, BAD_LINES, good
from tests.integration.intake import Intake

SKIP = OnInvalidLine.SKIP


@pytest.fixture
def intake(module_database):
    return Intake(module_database, MemoryBlobStore())


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad.name)
def test_one_bad_line_fails_the_batch(intake, bad):
    batch = intake.run(good("first") + b"\n" + bad.line + b"\n" + good("last"))
    assert batch.status is BatchStatus.FAILED
    assert batch.failed_at is not None
    [error] = batch.errors
    assert (error.code, error.line) == (bad.code, 2)
    assert bad.says in error.message
    assert intake.lines_to_run(batch) == []


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad.name)
def test_or_is_skipped_and_the_rest_runs(intake, bad):
    batch = intake.run(good("first") + b"\n" + bad.line + b"\n" + good("last"), SKIP)
    assert batch.status is BatchStatus.IN_PROGRESS
    assert (batch.total, batch.completed, batch.failed) == (3, 0, 1)
    assert batch.errors == ()
    assert sorted(intake.lines_to_run(batch)) == [1, 3]
    [(line_no, refused)] = intake.results(batch).items()
    assert line_no == 2
    assert (refused.custom_id, refused.status_code) == (bad.custom_id, 400)
    assert refused.body["error"]["code"] == bad.code
    assert refused.body["error"]["message"].startswith("Line 2: ")


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(intake, name):
    batch = intake.run(ACCEPTED[name])
    assert batch.status is BatchStatus.IN_PROGRESS
    assert (batch.total, batch.failed) == (2, 0)
    assert sorted(intake.lines_to_run(batch)) == [1, 2]


@pytest.mark.parametrize("mode", OnInvalidLine)
@pytest.mark.parametrize("data", [b"", b"\n", b"\n \r\n\n"], ids=["empty", "one newline", "blank lines"])
def test_a_file_without_requests_fails_in_both_modes(intake, data, mode):
    batch = intake.run(data, mode)
    assert batch.status is BatchStatus.FAILED
    assert [(error.code, error.line) for error in batch.errors] == [("empty_file", None)]


@pytest.mark.parametrize("mode", OnInvalidLine)
def test_too_many_lines_fail_in_both_modes(intake, mode):
    intake.limits = Limits(max_lines=3)
    batch = intake.run(b"\n".join(good(f"c{n}") for n in range(4)), mode)
    assert batch.status is BatchStatus.FAILED
    assert [error.code for error in batch.errors] == ["too_many_tasks"]
    assert "3 lines" in batch.errors[0].message
    assert intake.lines_to_run(batch) == []


def test_a_line_of_199_megabytes(intake):
    data = good("first") + b"\n" + b"x" * 199_000_000 + b"\n" + good("last")
    failed = intake.run(data)
    assert [(error.code, error.line) for error in failed.errors] == [("line_too_long", 2)]
    assert "199000000 bytes" in failed.errors[0].message
    skipped = intake.run(data, SKIP)
    assert (skipped.status, skipped.total, skipped.failed) == (BatchStatus.IN_PROGRESS, 3, 1)
    assert intake.results(skipped)[2].body["error"]["code"] == "line_too_long"


def test_a_repeated_custom_id_fails_the_batch(intake):
    batch = intake.run(b"\n".join([good("a"), good("b"), good("a"), good("a")]))
    assert batch.status is BatchStatus.FAILED
    assert [(error.code, error.line) for error in batch.errors] == [("duplicate_custom_id", 3), ("duplicate_custom_id", 4)]
    assert batch.errors[0].message == 'custom_id "a" was already used in line 1.'


def test_or_its_repetitions_are_skipped(intake):
    batch = intake.run(b"\n".join([good("a"), good("b"), good("a"), good("a")]), SKIP)
    assert (batch.status, batch.total, batch.failed) == (BatchStatus.IN_PROGRESS, 4, 2)
    assert sorted(intake.lines_to_run(batch)) == [1, 2]
    assert {n: line.body["error"]["code"] for n, line in intake.results(batch).items()} == dict.fromkeys((3, 4), "duplicate_custom_id")


def test_a_file_of_noise_gets_a_bounded_list(intake):
    batch = intake.run(b"noise\n" * 2500)
    assert batch.status is BatchStatus.FAILED
    assert [error.line for error in batch.errors] == [*range(1, 101), None]
    assert batch.errors[-1].message.startswith("2400 more errors")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_utf_16_file_says_so(intake, encoding):
    batch = intake.run((good("a") + b"\n" + good("b") + b"\n").decode().encode(encoding))
    assert batch.status is BatchStatus.FAILED
    assert {error.code for error in batch.errors} == {"invalid_json_line"}
    assert all("UTF-16" in error.message for error in batch.errors)
