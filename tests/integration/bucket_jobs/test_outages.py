"""Stores that cannot be reached for a while or for good (fault matrix 19 to 22, on users' buckets)."""

import pytest

from service.domain.job import BatchStatus
from service.errors import Unavailable
from service.usecases import finalize, validate
from service.usecases.finalize import finalize_batch
from service.usecases.oracles import check
from tests.contract.fault_proxy import error_inside_200, lose_reply, reset, slow_down
from tests.integration.bucket_jobs.bucketed import BAD, NAMES, assert_delivered, refused
from tests.integration.jobs import lines, settings_for

BOTO_TRIES = 5


@pytest.fixture
def hasty(monkeypatch):
    """boto3's own pauses between tries, left out."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.mark.parametrize(
    ("fault", "method", "part"),
    [
        (slow_down, "HEAD", "/in/job.jsonl"),
        (slow_down, "GET", "/in/job.jsonl"),
        (reset, "GET", "/in/job.jsonl"),
        (slow_down, "POST", "/out/manifest.json?uploads"),
    ],
)
def test_an_input_that_cannot_be_had_now_is_asked_for_again(jobs, proxy, hasty, fault, method, part):
    jobs.put(lines(3))
    batch = jobs.start()
    proxy.once(method, part, fault, times=BOTO_TRIES)
    item = jobs.claim(batch)
    with pytest.raises(Unavailable):
        jobs.validate(item)
    assert jobs.load(batch).status is BatchStatus.VALIDATING
    jobs.later(item)
    jobs.validate(jobs.claim(batch))
    assert (jobs.load(batch).status, proxy.faults) == (BatchStatus.IN_PROGRESS, [])


def test_a_store_that_stays_away_fails_the_batch_in_the_end(jobs, proxy, hasty, monkeypatch):
    monkeypatch.setattr(validate, "UNREACHABLE_ATTEMPTS", 1)
    jobs.put(lines(3))
    proxy.once("HEAD", "/in/job.jsonl", slow_down, times=BOTO_TRIES)
    error = refused(jobs)
    assert error.code == "input_uri_unavailable"
    assert "503" in error.message or "SlowDown" in error.message


@pytest.mark.parametrize(
    ("fault", "name"),
    [*((slow_down, name) for name in NAMES), (reset, "output.jsonl"), (lose_reply, "output.jsonl"), (lose_reply, "manifest.json")],
)
def test_an_output_that_cannot_be_written_now_is_written_later(jobs, proxy, hasty, tmp_path, fault, name):
    """Also where it was written and nobody heard of it."""
    batch = jobs.ran(BAD)
    proxy.once("PUT", f"/out/{name}", fault, times=BOTO_TRIES)
    item = jobs.item()
    try:
        finalize_batch(item, database=jobs.database, blobs=jobs.blobs, buckets=jobs.buckets)
    except Unavailable:
        assert jobs.load(batch).status is BatchStatus.FINALIZING
        assert "out/manifest.json" not in jobs.names("out") or name == "manifest.json"
        assert list(jobs.blobs.list("outputs/")) == []
        jobs.later(item)
        jobs.finalize(batch)
    else:
        assert fault is lose_reply
    batch = jobs.load(batch)
    assert (batch.status, proxy.faults) == (BatchStatus.COMPLETED, [])
    assert_delivered(jobs, batch, tmp_path)


def test_parts_and_a_completion_that_fails_in_its_200(jobs, proxy, hasty, tmp_path):
    """A large output goes in parts, one of which fails; so does the completion, at first."""
    jobs.settings = settings_for(jobs.settings.data_dir, standin={"answer_bytes": 600_000})
    proxy.once("PUT", "partNumber=2", slow_down)
    proxy.once("POST", "uploadId=", error_inside_200)
    batch = jobs.finalize(jobs.ran(lines(12)))
    assert (batch.status, proxy.faults) == (BatchStatus.COMPLETED, [])
    assert_delivered(jobs, batch, tmp_path)
    assert any("partNumber=2" in line for line in proxy.seen)


def test_an_output_that_never_gets_through_fails_the_batch_and_keeps_its_files(jobs, proxy, hasty, monkeypatch):
    monkeypatch.setattr(finalize, "UNREACHABLE_ATTEMPTS", 1)
    batch = jobs.ran()
    proxy.once("PUT", "/out/output.jsonl", slow_down, times=BOTO_TRIES)
    batch = jobs.finalize(batch)
    assert (batch.status, batch.errors[0].code) == (BatchStatus.FAILED, "output_uri_unavailable")
    assert len(jobs.files(batch)[0]) == 10
    assert check(jobs.database, jobs.blobs) == []
