"""Cancel and expiry at every moment (row 23 of the fault matrix): what is delivered is kept and billed, the rest is in the error file."""

import contextlib
import threading
import time
from contextlib import contextmanager

import pytest

from service.adapters.memory import MemoryBlobStore
from service.adapters.standin import StandinRunner
from service.domain.job import BatchStatus
from service.errors import Conflict, NotFound
from service.usecases.cancel import cancel_batch, expire_batch
from service.usecases.oracles import check
from service.usecases.sweep import sweep
from tests.integration.jobs import Jobs, lines, settings_for


@pytest.fixture
def jobs(database, tmp_path):
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path), group_lines=8)


class Stopping(StandinRunner):
    """Calls `action` in the middle of a run, once so many lines are out."""

    def __init__(self, jobs, after, action):
        super().__init__(jobs.settings)
        self.after, self.action = after, action

    def run(self, lines):
        for number, outcome in enumerate(super().run(lines), 1):
            yield outcome
            if number == self.after:
                self.action()


def cancel(jobs, batch):
    return cancel_batch(jobs.database, batch.project_id, batch.id)


def end(jobs, batch, how):
    """Cancels the batch, or lets its window pass."""
    if how == "cancelled":
        cancel(jobs, batch)
    else:
        jobs.expire_now(batch)
        assert sweep(jobs.database).expired == 1


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_before_any_line_ran(jobs, how):
    batch = jobs.run(lines(20))
    end(jobs, batch, how)
    assert jobs.drain() == 0
    batch = jobs.finalize(batch)
    output, errors = jobs.files(batch)
    assert batch.status.value == how
    assert (batch.completed, batch.failed, output) == (0, 20, [])
    assert {line.error_code for line in errors} == {f"batch_{how}"}
    assert [line.custom_id for line in errors] == [f"c{n}" for n in range(1, 21)]
    assert check(jobs.database, jobs.blobs) == []


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_in_the_middle(jobs, how):
    """Results that a worker brings after that are refused; those it had committed are in the output file."""
    batch = jobs.run(lines(40))

    def end_after_a_commit():
        while not jobs.load(batch).completed:
            time.sleep(0.01)
        end(jobs, batch, how)

    jobs.drain(runner=Stopping(jobs, 20, end_after_a_commit))
    batch = jobs.finalize(batch)
    assert batch.status.value == how
    assert 0 < batch.completed <= 20
    assert batch.completed + batch.failed == 40
    assert check(jobs.database, jobs.blobs) == []


def test_while_it_is_validated(jobs):
    """Validation stops, and no half-staged line counts."""
    batch = jobs.submit(lines(20))
    item = jobs.claim(batch)
    cancel(jobs, batch)
    jobs.validate(item)
    batch = jobs.finalize(batch)
    assert (batch.status, batch.total, batch.output_file_id, batch.error_file_id) == (BatchStatus.CANCELLED, 0, None, None)
    assert check(jobs.database, jobs.blobs) == []


def test_validation_ends_between_the_two_locks_of_a_cancel(jobs):
    """The groups that appear are closed as well: no line may run for a cancelled batch."""
    batch = jobs.submit(lines(20))
    item = jobs.claim(batch)
    database = jobs.database

    class Late:
        @contextmanager
        def begin(self):
            with database.begin() as uow:
                close = uow.groups.close_batch

                def close_then_validate(batch_id):
                    closed = close(batch_id)
                    if jobs.load(batch).status is BatchStatus.VALIDATING:
                        jobs.validate(item)
                    return closed

                uow.groups.close_batch = close_then_validate
                yield uow

    assert cancel_batch(Late(), batch.project_id, batch.id).status is BatchStatus.CANCELLING
    assert jobs.drain() == 0
    assert jobs.finalize(batch).failed == 20


def test_cancelling_twice_changes_nothing(jobs):
    batch = jobs.run(lines(3))
    first = cancel(jobs, batch)
    assert cancel(jobs, batch) == first
    done = jobs.finalize(batch)
    assert cancel(jobs, batch) == done


def test_what_has_ended_or_is_being_written_cannot_be_cancelled(jobs):
    batch = jobs.run(lines(3))
    jobs.drain()
    for _ in range(2):  # finalizing, then completed
        with pytest.raises(Conflict):
            cancel(jobs, batch)
        jobs.finalize(batch)


def test_a_foreign_batch_is_unknown(jobs):
    batch = jobs.run(lines(3))
    with pytest.raises(NotFound):
        cancel_batch(jobs.database, "proj_other", batch.id)


def test_a_batch_in_time_does_not_expire(jobs):
    batch = jobs.run(lines(3))
    assert not expire_batch(jobs.database, batch.id)
    assert jobs.drain() == 3


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_race_with_the_last_commit_has_one_winner(jobs, how):
    for _ in range(5):
        batch = jobs.run(lines(16))
        thread = threading.Thread(target=lambda batch=batch: _quietly(lambda: end(jobs, batch, how)))
        thread.start()
        jobs.drain()
        thread.join()
        done = jobs.finalize(batch)
        assert done.status in (BatchStatus.COMPLETED, BatchStatus(how))
        assert done.completed + done.failed == 16
    assert check(jobs.database, jobs.blobs) == []


def _quietly(action):
    with contextlib.suppress(Conflict, AssertionError):  # the commit was faster
        action()
