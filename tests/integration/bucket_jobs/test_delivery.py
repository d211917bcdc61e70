"""What arrives in the bucket, whatever becomes of the input meanwhile."""

import orjson
import pytest

from service.domain.job import BatchStatus
from service.errors import BlobCorrupt
from service.usecases.cancel import cancel_batch
from service.usecases.corrections import reverse_charge
from service.usecases.report import batch_cost
from tests.bad_input import body, good
from tests.contract.fault_proxy import cut_after
from tests.integration.bucket_jobs.bucketed import BAD, assert_delivered
from tests.integration.jobs import lines


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
