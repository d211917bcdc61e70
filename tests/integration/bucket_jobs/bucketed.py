"""Jobs whose input and output lie in a bucket, and what must then be in it."""

import hashlib
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import orjson
import pytest

from service.billing.price_book import exact_dollars
from service.domain.job import BatchStatus, OnInvalidLine
from service.ports import OutboxKind
from service.usecases.oracles import check
from service.usecases.report import batch_cost
from tests.bad_input import body, good
from tests.integration.intake import LEASE
from tests.integration.jobs import Jobs, lines

NAMES = ("output.jsonl", "errors.jsonl", "cost.json", "manifest.json")
BAD = b"\n".join(good(f"c{n}", body=body(max_tokens=-1) if n in (2, 5) else body()) for n in range(1, 8)) + b"\n"
RECOMPUTE = Path(__file__).parents[3] / "infra" / "examples" / "recompute_bill.py"


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


def refused(jobs, **changes):
    """The errors of a batch that fails in validation."""
    batch = jobs.start(**changes)
    jobs.validate(jobs.claim(batch))
    batch = jobs.load(batch)
    assert batch.status is BatchStatus.FAILED
    (error,) = batch.errors
    return error


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
        assert (described["bytes"], described["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
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
