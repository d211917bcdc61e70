"""Finalisation: files in input order, exposed once, whoever dies or races (row 22 of the fault matrix)."""

import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest

from service.adapters.memory import MemoryBlobStore
from service.domain.job import BatchStatus
from service.domain.line import Outcome
from service.errors import BlobCorrupt, BlobNotFound, LeaseLost
from service.ports import OutboxKind
from service.usecases.finalize import finalize_batch
from service.usecases.janitor import clean
from service.usecases.oracles import check
from tests.bad_input import body, good
from tests.integration.intake import LEASE
from tests.integration.jobs import Jobs, lines, settings_for


class Interruption(Exception):
    """Stands for the death of the process."""


class Dying:
    """A database or object store that dies at its n-th use: `method` is the one that counts."""

    def __init__(self, inner, method, at):
        self.inner, self.method, self.at, self.used = inner, method, at, 0

    def __getattr__(self, name):
        value = getattr(self.inner, name)
        if name != self.method:
            return value
        self.used += 1
        if self.used == self.at:
            raise Interruption
        return value


@pytest.fixture
def jobs(database, tmp_path):
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path))


def claim(jobs, lease=LEASE):
    with jobs.database.begin() as uow:
        (item,) = uow.outbox.claim("test", kinds=[OutboxKind.FINALIZE], lease=lease, limit=10)
    return item


def ready(jobs, data=None):
    """A batch whose lines have all run."""
    batch = jobs.run(data or lines(30))
    jobs.drain()
    return batch


def give_up(jobs, item):
    """What the end of a dead finaliser's lease does."""
    with jobs.database.begin() as uow:
        uow.outbox.retry(item, error="died", delay=timedelta(0))


def test_rejected_lines_go_to_the_error_file_unbilled_and_order_is_kept(jobs):
    bad = {2, 3, 17}
    data = b"\n".join(good(f"c{n}", body=body(max_tokens=-1) if n in bad else body()) for n in range(1, 21))
    batch = jobs.complete(data)
    output, errors = jobs.files(batch)
    assert [line.custom_id for line in errors] == ["c2", "c3", "c17"]
    assert [line.custom_id for line in output] == [f"c{n}" for n in range(1, 21) if n not in bad]
    assert {line.status_code for line in errors} == {400}
    assert (batch.completed, batch.failed) == (17, 3)
    assert check(jobs.database, jobs.blobs) == []


def test_all_lines_rejected_means_completed_without_an_output_file(jobs):
    batch = jobs.complete(b"\n".join(good(f"c{n}", body=body(max_tokens=-1)) for n in range(3)))
    assert (batch.status, batch.output_file_id, batch.completed, batch.failed) == (BatchStatus.COMPLETED, None, 0, 3)
    assert batch.error_file_id is not None


def test_files_expire_with_the_batch_s_wish(jobs):
    batch = jobs.submit(lines(2), output_expires_after=3600)
    jobs.validate(jobs.claim(batch))
    jobs.drain()
    batch = jobs.finalize(batch)
    with jobs.database.begin() as uow:
        file = uow.files.get(batch.project_id, batch.output_file_id)
    assert file.expires_at == batch.created_at + timedelta(seconds=3600)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_killed_at_each_transaction_another_finaliser_redoes_it(jobs, at):
    batch = ready(jobs)
    item = claim(jobs)
    with pytest.raises(Interruption):
        finalize_batch(item, database=Dying(jobs.database, "begin", at), blobs=jobs.blobs, buckets=jobs.buckets)
    assert jobs.load(batch).status is BatchStatus.FINALIZING
    assert jobs.load(batch).output_file_id is None
    give_up(jobs, item)
    batch = jobs.finalize(batch)
    assert batch.status is BatchStatus.COMPLETED
    assert check(jobs.database, jobs.blobs) == []
    clean(jobs.database, jobs.blobs, orphans_after=timedelta(0))
    assert len(list(jobs.blobs.list("outputs/"))) == 1


def test_killed_while_it_reads_segments(jobs):
    batch = ready(jobs)
    item = claim(jobs)
    with pytest.raises(Interruption):
        finalize_batch(item, database=jobs.database, blobs=Dying(jobs.blobs, "open", 1), buckets=jobs.buckets)
    give_up(jobs, item)
    assert jobs.finalize(batch).status is BatchStatus.COMPLETED


def test_of_two_finalisers_one_exposes(jobs):
    """The slower one finds its token out of date in the last transaction, and removes its files."""
    batch = ready(jobs)
    first = claim(jobs, lease=timedelta(0))
    second = claim(jobs)
    finalize_batch(second, database=jobs.database, blobs=jobs.blobs, buckets=jobs.buckets)
    with pytest.raises(LeaseLost):
        finalize_batch(first, database=jobs.database, blobs=jobs.blobs, buckets=jobs.buckets)
    assert jobs.load(batch).status is BatchStatus.COMPLETED
    assert check(jobs.database, jobs.blobs) == []


def test_a_finaliser_that_was_overtaken_at_the_end_leaves_nothing(jobs):
    batch = ready(jobs)
    first = claim(jobs, lease=timedelta(0))

    class Overtaken:
        """Lets the second finaliser do everything before the first one's last transaction."""

        begun = 0

        @contextmanager
        def begin(self):
            Overtaken.begun += 1
            if Overtaken.begun == 3:
                finalize_batch(claim(jobs), database=jobs.database, blobs=jobs.blobs, buckets=jobs.buckets)
            with jobs.database.begin() as uow:
                yield uow

    with pytest.raises(LeaseLost):
        finalize_batch(first, database=Overtaken(), blobs=jobs.blobs, buckets=jobs.buckets)
    assert check(jobs.database, jobs.blobs) == []
    assert [info.key.split("/")[2] for info in jobs.blobs.list("outputs/")] == ["2"]
    assert jobs.load(batch).completed == 30


def test_two_finalisers_at_the_same_time(jobs):
    batch = ready(jobs, lines(200))
    items = [claim(jobs, lease=timedelta(0)), claim(jobs)]
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
    assert jobs.load(batch).status is BatchStatus.COMPLETED
    assert check(jobs.database, jobs.blobs) == []


def test_a_finished_item_is_a_finished_item(jobs):
    """The answer of the last commit was lost: the next finaliser finds the batch ended and closes the item."""
    batch = ready(jobs)
    item = claim(jobs, lease=timedelta(0))
    finalize_batch(item, database=jobs.database, blobs=jobs.blobs, buckets=jobs.buckets)
    with jobs.database.begin() as uow:
        uow.outbox.add(OutboxKind.FINALIZE, batch_id=batch.id)
    before = jobs.load(batch)
    assert jobs.finalize(batch) == before


def test_a_segment_with_other_bytes_stops_it(jobs):
    batch = ready(jobs)
    (segment,) = jobs.blobs.list("segments/")
    with jobs.blobs.open(segment.key) as stream:
        data = stream.read()
    jobs.blobs.put(segment.key, data.replace(b"c1", b"d1", 1))
    with pytest.raises(BlobCorrupt):
        jobs.finalize(batch)
    assert {violation.oracle for violation in check(jobs.database, jobs.blobs, batch.id)} == {"O6"}
    jobs.blobs.delete(segment.key)
    with jobs.database.begin() as uow:
        uow.outbox.add(OutboxKind.FINALIZE, batch_id=batch.id, payload={"again": 1})
    with pytest.raises(BlobNotFound):
        jobs.finalize(batch)


def test_a_batch_whose_counters_are_wrong_is_not_exposed(jobs):
    batch = ready(jobs)
    with jobs.database.begin() as uow:
        uow.batches.save(jobs.load(batch).evolve(total=31))
    with pytest.raises(BlobCorrupt, match="its lines say"):
        jobs.finalize(batch)


def test_results_carry_their_outcome(jobs):
    batch = jobs.complete(lines(3))
    with jobs.database.begin() as uow:
        assert [stored.outcome for _, _, stored in uow.results.in_order(batch.id)] == [Outcome.SUCCEEDED] * 3
