"""Jobs from bucket to bucket, over HTTP: what arrives there, what goes wrong there, and who is told what."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import boto3
import orjson
import pytest
from structlog.testing import capture_logs

from service.adapters.blobs_s3 import S3BlobStore
from service.adapters.buckets_s3 import S3Buckets
from service.adapters.memory import MemoryBlobStore
from service.adapters.s3_client import s3_client
from service.adapters.vault import Vault
from service.billing.price_book import exact_dollars
from service.config import S3
from service.domain.job import BatchStatus, OnInvalidLine
from service.errors import BlobCorrupt, LeaseLost, Unavailable
from service.ports import OutboxKind
from service.usecases import finalize, validate
from service.usecases.bucket_access import set_access
from service.usecases.cancel import cancel_batch
from service.usecases.corrections import reverse_charge
from service.usecases.finalize import finalize_batch
from service.usecases.janitor import clean
from service.usecases.keys import Caller
from service.usecases.oracles import check
from service.usecases.report import batch_cost
from service.usecases.retry_failed import retry_failed
from tests.bad_input import body, good
from tests.contract.fault_proxy import FaultProxy, cut_after, error_inside_200, lose_reply, reset, slow_down
from tests.integration.intake import LEASE
from tests.integration.jobs import Jobs, lines, settings_for

NAMES = ("output.jsonl", "errors.jsonl", "cost.json", "manifest.json")
RECOMPUTE = Path(__file__).parents[2] / "infra" / "examples" / "recompute_bill.py"
BAD = b"\n".join(good(f"c{n}", body=body(max_tokens=-1) if n in (2, 5) else body()) for n in range(1, 8)) + b"\n"


class Bucketed(Jobs):
    """Jobs whose input and output lie in a bucket that is looked at with plain boto3."""

    client = bucket = None

    def put(self, data, key="in/job.jsonl"):
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def get(self, name, folder="out"):
        return self.client.get_object(Bucket=self.bucket, Key=f"{folder}/{name}")["Body"].read()

    def names(self, prefix=""):
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", ())]

    def start(self, on_invalid_line=OnInvalidLine.FAIL, **changes):
        """A batch on the bucket's object, not yet validated."""
        batch = self.submit(b"not looked at", on_invalid_line)
        values = {"input_file_id": None, "input_uri": f"s3://{self.bucket}/in/job.jsonl", "output_uri": f"s3://{self.bucket}/out"}
        with self.database.begin() as uow:
            uow.batches.save(batch.evolve(**values | changes))
        return self.load(batch)

    def ran(self, data=None, **changes):
        """A batch whose lines have all run."""
        self.put(data or lines(10))
        batch = self.start(**changes)
        self.validate(self.claim(batch))
        self.drain()
        return self.load(batch)

    def item(self, kind=OutboxKind.FINALIZE, lease=LEASE):
        with self.database.begin() as uow:
            (item,) = uow.outbox.claim("test", kinds=[kind], lease=lease, limit=10)
        return item

    def later(self, item):
        """What the control process does with an item that failed."""
        with self.database.begin() as uow:
            uow.outbox.retry(item, error="failed", delay=timedelta(0))


@pytest.fixture
def proxy(s3_url):
    with FaultProxy(s3_url) as running:
        yield running


@pytest.fixture
def jobs(database, tmp_path, s3_settings, s3_bucket, proxy):
    """Users' buckets are reached through the proxy."""
    settings = s3_settings.model_copy(update={"endpoint_url": proxy.url})
    buckets = S3Buckets(settings, Vault("key", tmp_path / "none"), own=("own", "prefix"))
    made = Bucketed(database, MemoryBlobStore(), settings=settings_for(tmp_path), buckets=buckets)
    made.client = boto3.client(
        "s3", endpoint_url=s3_settings.endpoint_url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    made.bucket = s3_bucket
    return made


def assert_delivered(jobs, batch, tmp_path, folder="out"):
    """The folder holds the batch: bytes as in our own files, counts, hashes, and a bill that a stranger finds right."""
    manifest = orjson.loads(jobs.get("manifest.json", folder))
    assert (manifest["batch_id"], manifest["model"]) == (batch.id, batch.model)
    assert manifest["request_counts"] == {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
    assert (manifest["input"]["uri"], manifest["input"]["file_id"]) == (batch.input_uri, batch.input_file_id)
    for name, file_id in (("output", batch.output_file_id), ("errors", batch.error_file_id), ("cost", None)):
        described = manifest["objects"][name]
        if described is None:
            assert file_id is None
            continue
        data = jobs.get(described["uri"].rpartition("/")[2], folder)
        assert (described["bytes"], described["sha256"]) == (len(data), finalize.hashlib.sha256(data).hexdigest())
        if file_id is not None:
            with jobs.database.begin() as uow:
                file = uow.files.get(batch.project_id, file_id)
            assert (file.bytes, file.sha256) == (described["bytes"], described["sha256"])
            assert described["lines"] == data.count(b"\n")
    assert_billed(jobs, batch, tmp_path, folder)
    assert check(jobs.database, jobs.blobs, batch.id) == []


def assert_billed(jobs, batch, tmp_path, folder):
    raw = jobs.get("cost.json", folder)
    cost = json.loads(raw, parse_float=lambda text: pytest.fail(f"a float in cost.json: {text}"))
    bill = batch_cost(jobs.database, batch.project_id, batch.id)
    assert (cost["amount_femto_dollars"], cost["billed_lines"]) == (bill.total, bill.lines)
    assert cost["amount"] == exact_dollars(bill.total)
    output = tmp_path / "output.jsonl"
    output.write_bytes(jobs.get("output.jsonl", folder) if f"{folder}/output.jsonl" in jobs.names(folder) else b"")
    (tmp_path / "cost.json").write_bytes(raw)
    done = subprocess.run([sys.executable, "-I", RECOMPUTE, output, tmp_path / "cost.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"says {cost['amount_nano_dollars']} for {bill.lines}" in done.stdout
    cost["amount_femto_dollars"] += 1
    (tmp_path / "cost.json").write_bytes(orjson.dumps(cost))
    assert subprocess.run([sys.executable, "-I", RECOMPUTE, output, tmp_path / "cost.json"], capture_output=True).returncode == 1


# --- what arrives -----------------------------------------------------------------------------------------------------------------


def test_from_bucket_to_bucket(jobs, tmp_path):
    batch = jobs.ran(BAD)
    batch = jobs.finalize(batch)
    assert (batch.status, batch.errors, batch.input_changed) == (BatchStatus.COMPLETED, (), False)
    assert_delivered(jobs, batch, tmp_path)
    output, errors = jobs.files(batch)
    assert ([line.custom_id for line in output], [line.custom_id for line in errors]) == (["c1", "c3", "c4", "c6", "c7"], ["c2", "c5"])
    assert jobs.names("out") == ["out/cost.json", "out/errors.jsonl", "out/manifest.json", "out/output.jsonl"]
    with jobs.database.begin() as uow:
        copied = uow.files.get(batch.project_id, batch.input_file_id)
    assert (copied.filename, copied.bytes) == ("job.jsonl", len(BAD))


def test_the_root_of_a_bucket_and_no_answers_at_all(jobs, tmp_path):
    batch = jobs.finalize(
        jobs.ran(b"\n".join(good(f"c{n}", body=body(max_tokens=-1)) for n in range(3)), output_uri=f"s3://{jobs.bucket}/")
    )
    assert batch.output_file_id is None
    manifest = orjson.loads(jobs.client.get_object(Bucket=jobs.bucket, Key="manifest.json")["Body"].read())
    assert (manifest["objects"]["output"], manifest["objects"]["errors"]["lines"]) == (None, 3)


def test_a_cancelled_batch_delivers_what_it_has(jobs, tmp_path):
    jobs.put(lines(5))
    batch = jobs.start()
    jobs.validate(jobs.claim(batch))
    cancel_batch(jobs.database, batch.project_id, batch.id)
    batch = jobs.finalize(batch)
    assert batch.status is BatchStatus.CANCELLED
    assert orjson.loads(jobs.get("manifest.json"))["status"] == "cancelled"
    assert_delivered(jobs, batch, tmp_path)


def test_an_uploaded_file_can_go_to_a_bucket(jobs, tmp_path):
    batch = jobs.submit(lines(3), output_uri=f"s3://{jobs.bucket}/out")
    jobs.validate(jobs.claim(batch))
    jobs.drain()
    assert_delivered(jobs, jobs.finalize(batch), tmp_path)


def test_a_reversed_charge_is_taken_off_and_shown(jobs, tmp_path):
    batch = jobs.ran()
    reverse_charge(jobs.database, batch.id, 3)
    batch = jobs.finalize(batch)
    cost = orjson.loads(jobs.get("cost.json"))
    assert cost["reversed_femto_dollars"] > 0
    assert cost["amount_femto_dollars"] == cost["charged_femto_dollars"] - cost["reversed_femto_dollars"]
    assert cost["amount_femto_dollars"] == batch_cost(jobs.database, batch.project_id, batch.id).total


# --- an object that changes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [b"something else", None])
def test_an_object_that_changes_after_validation_changes_no_line_and_is_reported(jobs, tmp_path, after):
    jobs.put(lines(5))
    batch = jobs.start()
    jobs.validate(jobs.claim(batch))
    jobs.put(after) if after else jobs.client.delete_object(Bucket=jobs.bucket, Key="in/job.jsonl")
    jobs.drain()
    batch = jobs.finalize(batch)
    assert (batch.status, batch.completed, batch.input_changed) == (BatchStatus.COMPLETED, 5, True)
    assert orjson.loads(jobs.get("manifest.json"))["input"]["changed_since"] is True
    assert_delivered(jobs, batch, tmp_path)


def test_an_object_that_changes_while_it_is_read_is_read_again_from_the_start(jobs, proxy):
    old, new = lines(30_000), lines(7)
    jobs.put(old)

    def replaced(handler, request):
        """The stream breaks in the middle, and by then another object is there."""
        cut_after(1 << 20)(handler, request)
        jobs.put(new)

    proxy.once("GET", "/in/job.jsonl", replaced)
    batch = jobs.start()
    item = jobs.claim(batch)
    with pytest.raises(BlobCorrupt, match="replaced"):
        jobs.validate(item)
    assert [info.key for info in jobs.blobs.list("inputs/")] == [], "a copy of half an object stayed"
    jobs.later(item)
    jobs.validate(jobs.claim(batch))
    assert jobs.load(batch).total == 7


# --- refusals ---------------------------------------------------------------------------------------------------------------------


def refused(jobs, **changes):
    """The errors of a batch that fails in validation."""
    batch = jobs.start(**changes)
    jobs.validate(jobs.claim(batch))
    batch = jobs.load(batch)
    assert batch.status is BatchStatus.FAILED
    (error,) = batch.errors
    return error


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


# --- outages (fault matrix 19 to 22, on users' buckets) ---------------------------------------------------------------------------

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


class Interruption(BaseException):
    """Ends a finaliser the way a kill does: nothing is tidied up."""


class Trapped:
    """A client that ends the process at one request."""

    def __init__(self, client, at):
        self._client, self._at = client, at

    def __getattr__(self, name):
        method = getattr(self._client, name)
        verb = {"head_object": "HEAD", "put_object": "PUT"}.get(name)

        def call(**request):
            if f"{verb} {request.get('Key')}" == self._at:
                raise Interruption
            return method(**request)

        return call if verb else method


@pytest.mark.parametrize("at", ["HEAD in/job.jsonl", "HEAD out/manifest.json", *(f"PUT out/{name}" for name in NAMES), "end"])
def test_a_finaliser_killed_at_any_object_is_redone(jobs, tmp_path, at):
    """At the end: every object is there, and the database does not know yet."""
    batch = jobs.ran(BAD)
    item = jobs.item()

    class Killed(S3Buckets):
        """Opens buckets whose requests end the process before the one named `at` is sent."""

        def open(self, bucket, access):
            opened = super().open(bucket, access)
            opened._client = Trapped(opened._client, at)
            return opened

    class Ended:
        begun = 0

        @contextmanager
        def begin(self):
            Ended.begun += 1
            if at == "end" and "out/manifest.json" in jobs.names("out"):
                raise Interruption
            with jobs.database.begin() as uow:
                yield uow

    killed = Killed(jobs.buckets._settings, jobs.buckets._vault, own=None)
    with pytest.raises(Interruption):
        finalize_batch(item, database=Ended(), blobs=jobs.blobs, buckets=killed)
    assert jobs.load(batch).output_file_id is None
    jobs.later(item)
    batch = jobs.finalize(batch)
    assert batch.status is BatchStatus.COMPLETED
    assert_delivered(jobs, batch, tmp_path)
    clean(jobs.database, jobs.blobs, orphans_after=timedelta(0))
    assert len(list(jobs.blobs.list("outputs/"))) == 2


def test_of_two_finalisers_at_the_same_time_one_exposes(jobs, tmp_path):
    batch = jobs.ran(lines(50))
    items = [jobs.item(lease=timedelta(0)), jobs.item()]
    refused = []

    def run(item):
        try:
            finalize_batch(item, database=jobs.database, blobs=jobs.blobs, buckets=jobs.buckets)
        except LeaseLost as error:
            refused.append(error)

    threads = [threading.Thread(target=run, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert_delivered(jobs, jobs.load(batch), tmp_path)


def test_a_finaliser_that_was_overtaken_writes_nothing_more(jobs, tmp_path):
    """It finds its token out of date before the next object."""
    batch = jobs.ran(BAD)
    first = jobs.item(lease=timedelta(0))

    class Overtaken:
        begun = 0

        @contextmanager
        def begin(self):
            Overtaken.begun += 1
            if Overtaken.begun == 6:
                jobs.finalize(batch)
                jobs.seen = len(jobs.names("out"))
            with jobs.database.begin() as uow:
                yield uow

    with pytest.raises(LeaseLost):
        finalize_batch(first, database=Overtaken(), blobs=jobs.blobs, buckets=jobs.buckets)
    assert_delivered(jobs, jobs.load(batch), tmp_path)
    assert [info.key.split("/")[2] for info in jobs.blobs.list("outputs/")] == ["2", "2"]
