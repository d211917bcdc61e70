"""Buckets and objects that are not there, not to be touched or not to be written over: who is told what."""

from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from service.adapters.blobs_s3 import S3BlobStore
from service.adapters.buckets_s3 import S3Buckets
from service.adapters.s3_client import s3_client
from service.adapters.vault import Vault
from service.config import S3
from service.domain.job import BatchStatus
from service.usecases.bucket_access import set_access
from service.usecases.janitor import clean
from service.usecases.keys import Caller
from service.usecases.oracles import check
from service.usecases.retry_failed import retry_failed
from tests.integration.bucket_jobs.bucketed import BAD, assert_delivered, refused
from tests.integration.jobs import lines


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input_uri": "s3://{bucket}/nothing"}, "input_uri_not_found", "input_uri"),
        ({"input_uri": "s3://missing-bucket/in"}, "input_uri_not_found", "input_uri"),
        ({"output_uri": "s3://missing-bucket/out"}, "output_uri_not_found", "output_uri"),
        ({"input_uri": "s3://own/prefix/files/someone/input.jsonl"}, "bucket_not_allowed", "input_uri"),
        ({"output_uri": "s3://own/prefix"}, "bucket_not_allowed", "output_uri"),
    ],
)
def test_what_is_not_there_or_not_to_be_touched(jobs, changes, code, param):
    jobs.put(lines(3))
    error = refused(jobs, **{name: value.format(bucket=jobs.bucket) for name, value in changes.items()})
    assert (error.code, error.param, error.line) == (code, param, None)
    assert jobs.names("out") == []


@pytest.mark.parametrize(
    ("secret", "input_uri", "output_uri", "code"),
    [
        ("wrong", "s3://bucket/job.jsonl", None, "input_uri_denied"),
        ("wrong", None, "s3://bucket/out", "output_uri_denied"),
        ("secret", "s3://bucket/nothing.jsonl", None, "input_uri_not_found"),
        ("secret", "s3://bucket/job.jsonl", "s3://bucket/out", None),
    ],
)
def test_a_projects_own_credentials_by_a_server_that_checks_them(jobs, guarded, tmp_path, secret, input_uri, output_uri, code):
    """The batch fails with what its owner can do about it; the deployment's own credentials are not tried instead."""
    reached = S3BlobStore(s3_client(guarded), "bucket", "", part_bytes=5 << 20)
    reached.put("job.jsonl", lines(5))
    jobs.buckets = S3Buckets(S3(allow_private_endpoints=True), Vault("key", tmp_path / "none"), own=None)
    options = {"access_key_id": "right", "secret": secret, "endpoint_url": guarded.endpoint_url, "path_style": True}
    set_access(jobs.database, jobs.buckets, jobs.project.id, **options)
    batch = jobs.start(input_uri=input_uri or "s3://bucket/job.jsonl", output_uri=output_uri)
    with capture_logs() as logs:
        jobs.validate(jobs.claim(batch))
    batch = jobs.load(batch)
    if code is None:
        jobs.drain()
        assert jobs.finalize(batch).status is BatchStatus.COMPLETED
        assert [info.key for info in reached.list("out/")] == ["out/cost.json", "out/manifest.json", "out/output.jsonl"]
        return
    (error,) = batch.errors
    assert (batch.status, error.code, error.param) == (BatchStatus.FAILED, code, code.removesuffix("_denied").removesuffix("_not_found"))
    if code.endswith("denied"):
        assert "longdraft s3 credentials" in error.message
    assert all(word not in f"{error}{logs}" for word in ("'wrong'", " secret,"))


def test_an_object_over_the_limit_is_not_read(jobs, proxy):
    jobs.limits = jobs.limits.model_copy(update={"max_file_bytes": 1000})
    jobs.put(lines(100))
    assert refused(jobs).code == "input_uri_too_large"
    assert not any(line.startswith("GET") and "job.jsonl" in line for line in proxy.seen)


def test_bad_lines_fail_the_batch_as_in_a_file_and_no_copy_stays(jobs):
    jobs.put(b"broken\n")
    assert refused(jobs).code == "invalid_json_line"
    assert list(jobs.blobs.list("inputs/")) == []


def test_results_are_never_written_over_those_of_another_batch(jobs, tmp_path):
    first = jobs.finalize(jobs.ran())
    error = refused(jobs)
    assert (error.code, error.param) == ("output_uri_taken", "output_uri")
    assert_delivered(jobs, first, tmp_path)


def test_a_folder_that_another_batch_finished_in_meanwhile_is_left_alone(jobs, tmp_path):
    batch = jobs.ran()
    theirs = b'{"batch_id": "batch_other"}'
    jobs.client.put_object(Bucket=jobs.bucket, Key="out/manifest.json", Body=theirs)
    batch = jobs.finalize(batch)
    assert (batch.status, batch.errors[0].code) == (BatchStatus.FAILED, "output_uri_taken")
    assert (jobs.names("out"), jobs.get("manifest.json")) == (["out/manifest.json"], theirs)


def test_results_whose_bucket_is_gone_are_there_as_files_and_can_be_retried(jobs):
    gone = f"{jobs.bucket}-out"
    jobs.client.create_bucket(Bucket=gone)
    batch = jobs.ran(BAD, output_uri=f"s3://{gone}/x")
    jobs.client.delete_bucket(Bucket=gone)
    batch = jobs.finalize(batch)
    assert (batch.status, batch.errors[0].code) == (BatchStatus.FAILED, "output_uri_not_found")
    output, errors = jobs.files(batch)
    assert (len(output), len(errors)) == (5, 2) == (batch.completed, batch.failed)
    assert check(jobs.database, jobs.blobs) == []
    clean(jobs.database, jobs.blobs, orphans_after=timedelta(0))
    assert len(jobs.files(batch)[0]) == 5
    again = retry_failed(batch.id, caller=Caller(batch.project_id, None, ("all",)), database=jobs.database, blobs=jobs.blobs)
    assert (again.parent_batch_id, again.output_uri) == (batch.id, None)
