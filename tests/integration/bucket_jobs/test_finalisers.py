"""Finalisers that are killed, doubled or overtaken while they write to a bucket."""

import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest

from service.adapters.buckets_s3 import S3Buckets
from service.domain.job import BatchStatus
from service.errors import LeaseLost
from service.usecases.finalize import finalize_batch
from service.usecases.janitor import clean
from tests.integration.bucket_jobs.bucketed import BAD, NAMES, assert_delivered
from tests.integration.jobs import lines


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
