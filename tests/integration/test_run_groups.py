"""The worker's pull on a real database, with the stand-in engine."""

import itertools
import threading
from contextlib import contextmanager

import pytest

from service.adapters.memory import MemoryBlobStore
from service.adapters.standin import StandinRunner
from service.billing.reports import cost_json
from service.domain.job import BatchStatus
from service.errors import ModelUnavailable, Unavailable
from service.usecases.oracles import check
from service.usecases.report import batch_cost
from tests.bad_input import body, good
from tests.integration.intake import LEASE
from tests.integration.jobs import Jobs, lines, settings_for


@pytest.fixture
def jobs(database, tmp_path):
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path))


def test_a_job_comes_out_in_input_order_and_is_billed_once_a_line(jobs):
    batch = jobs.complete(lines(150))
    output, errors = jobs.files(batch)
    assert batch.status is BatchStatus.COMPLETED
    assert [line.custom_id for line in output] == [f"c{n}" for n in range(1, 151)]
    assert errors == []
    assert (batch.completed, batch.failed, batch.error_file_id) == (150, 0, None)
    with jobs.database.begin() as uow:
        assert uow.ledger.batch_total(batch.id).lines == 150
        assert not uow.ledger.violations()
    assert check(jobs.database, jobs.blobs) == []
    cost = cost_json(batch_cost(jobs.database, batch.project_id, batch.id))
    assert cost["lines"] == {"total": 150, "billed": 150, "completed": 150, "failed": 0}


def test_a_body_that_the_runner_cannot_take_is_that_line_s_problem(jobs):
    data = lines(5) + good("bad", body=body(temperature=99)) + b"\n"
    batch = jobs.complete(data)
    output, errors = jobs.files(batch)
    assert (len(output), [line.custom_id for line in errors], errors[0].status_code) == (5, ["bad"], 400)


def test_lines_of_several_batches_and_models_share_a_worker(jobs):
    first = jobs.run(lines(10) + b"\n".join(good(f"o{n}", body=body(model="other")) for n in range(10)))
    second = jobs.run(lines(7))
    assert jobs.drain() == 27
    for batch, count in ((first, 20), (second, 7)):
        assert jobs.finalize(batch).completed == count or jobs.load(batch).completed == count
    assert check(jobs.database, jobs.blobs) == []


def test_stop_gives_everything_back_and_counts_no_attempt(jobs, tmp_path):
    jobs.settings = settings_for(tmp_path, standin={"delay": 30.0})
    batch = jobs.run(lines(100))
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    assert jobs.drain(stop=stop) == 0
    with jobs.database.begin() as uow:
        assert uow.watch.due() == {"smollm2-135m": 2}
        leases = uow.groups.claim("look", model=None, lease=LEASE, max_lines=1000)
        pending = uow.lines.pending([lease.group_id for lease in leases])
    assert (len(pending), {line.attempts for line in pending}) == (100, {0})
    assert jobs.load(batch).completed == 0


def test_a_runner_that_dies_keeps_what_was_finished_and_accuses_the_rest(jobs):
    batch = jobs.run(lines(64))

    class Dying(StandinRunner):
        def run(self, lines):
            for number, outcome in enumerate(super().run(lines)):
                if number == 10:
                    raise MemoryError
                yield outcome

    with pytest.raises(MemoryError):
        jobs.drain(runner=Dying(jobs.settings))
    with jobs.database.begin() as uow:
        assert uow.watch.due() == {"smollm2-135m": 1}, "given back at once"
        (lease,) = uow.groups.claim("look", model=None, lease=LEASE, max_lines=1000)
        pending = uow.lines.pending([lease.group_id])
        uow.groups.release({lease.group_id: lease.token})
    assert len(pending) == 54
    assert {line.attempts for line in pending} == {1}
    jobs.drain()
    assert jobs.finalize(batch).completed == 64


def test_a_runner_that_swallows_a_line_does_not_hang_the_batch(jobs):
    """Three tries, the last one alone; then the line is given up and the batch ends."""
    batch = jobs.run(lines(8))

    class Swallowing(StandinRunner):
        def run(self, lines):
            return super().run(self._without(lines))

        def _without(self, lines):
            for line in lines:
                if line is not None and line.custom_id == "c3":
                    return  # the engine drops it and says nothing
                yield line

    for _ in range(4):
        jobs.drain(runner=Swallowing(jobs.settings))
    batch = jobs.finalize(batch)
    _, errors = jobs.files(batch)
    assert (batch.completed, [line.custom_id for line in errors], errors[0].error_code) == (7, ["c3"], "worker_crashed")
    assert check(jobs.database, jobs.blobs) == []


def test_a_model_that_cannot_be_loaded_leaves_the_groups_for_others(jobs):
    batch = jobs.run(lines(5))

    class Without(StandinRunner):
        def load(self, model):
            raise ModelUnavailable("no memory for it here")

    assert jobs.drain(runner=Without(jobs.settings)) == 0
    assert jobs.load(batch).status is BatchStatus.IN_PROGRESS
    with jobs.database.begin() as uow:
        assert (uow.watch.due(), uow.watch.due_or_leased()) == ({}, {"smollm2-135m": 1}), "they rest for a while"


def test_an_input_with_other_bytes_than_were_validated_is_not_run(jobs):
    batch = jobs.run(lines(5))
    (key,) = [info.key for info in jobs.blobs.list("files/")]
    jobs.blobs.put(key, lines(5).replace(b"hello", b"HELLO"))
    assert jobs.drain() == 0
    assert jobs.load(batch).status is BatchStatus.IN_PROGRESS


def test_a_commit_whose_answer_was_lost_is_settled_by_looking(jobs):
    """The transaction is in, the caller hears of an outage: doing it again delivers nothing twice."""
    batch = jobs.run(lines(30))
    inner, lost = jobs.database, []

    class Deaf:
        def __getattr__(self, name):
            return getattr(inner, name)

        @contextmanager
        def begin(self):
            added = []
            with inner.begin() as uow:
                add = uow.results.add
                uow.results.add = lambda *args: added.append(args) or add(*args)
                yield uow
            if added and len(lost) < 2:
                lost.append(added)
                raise Unavailable("the connection was cut")

    jobs.database = Deaf()
    jobs.drain()
    jobs.database = inner
    assert len(lost) >= 1
    assert jobs.finalize(batch).completed == 30
    assert check(jobs.database, jobs.blobs) == []


def test_a_worker_that_starts_in_an_outage_waits_for_its_end(jobs, monkeypatch):
    """Not for the answer to a ping: between that and its registration the next connection may be cut."""
    monkeypatch.setattr("service.usecases.heartbeat.RETRY", 0.01)
    batch = jobs.run(lines(10))
    inner, cut = jobs.database, []

    class Flaky:
        def __getattr__(self, name):
            return getattr(inner, name)

        def begin(self):
            if len(cut) < 3:
                cut.append(True)
                raise Unavailable("the connection was cut")
            return inner.begin()

    jobs.database = Flaky()
    assert jobs.drain() == 10
    jobs.database = inner
    assert len(cut) == 3
    assert jobs.finalize(batch).completed == 10


def test_a_suspect_waits_until_the_others_are_done_and_then_runs_alone(jobs):
    jobs.group_lines = 4
    batch = jobs.run(lines(20))
    with jobs.database.begin() as uow:
        for _ in range(2):
            uow.lines.admit([(batch.id, 6)])
    runs = []

    class Watching(StandinRunner):
        capacity = 4

        def run(self, lines):
            runs.append([])
            return super().run(self._seen(lines))

        def _seen(self, lines):
            for line in lines:
                if line is not None:
                    runs[-1].append(line.custom_id)
                yield line

    assert jobs.drain(runner=Watching(jobs.settings)) == 20
    assert runs[-1] == ["c6"]
    assert sorted(itertools.chain(*runs[:-1])) == sorted(f"c{n}" for n in range(1, 21) if n != 6)
    with jobs.database.begin() as uow:
        assert uow.watch.open_in(batch.id) == 0


def test_a_full_disk_delays_and_loses_nothing(jobs):
    """Row 26 of the fault matrix: segments cannot be stored for a while."""
    batch = jobs.run(lines(20))
    refused = []

    class Full(MemoryBlobStore):
        def put(self, key, data):
            if key.startswith("segments/") and len(refused) < 2:
                refused.append(key)
                raise Unavailable("No space left on device. Free some space.")
            return super().put(key, data)

    full = Full()
    full._objects.update(jobs.blobs._objects)
    jobs.blobs = full
    assert jobs.drain() == 20
    assert len(refused) == 2
    assert jobs.finalize(batch).completed == 20
    assert check(jobs.database, jobs.blobs) == []


def test_a_worker_that_meets_a_batch_again_recalls_what_was_delivered(jobs):
    """Their answers draft for the lines that are left: once a batch and load, and of the whole batch, whoever answered."""

    class Recalling(StandinRunner):
        def __init__(self, settings, die_at=None):
            super().__init__(settings)
            self.recalled, self.die_at = [], die_at

        def recall(self, answers):
            self.recalled.append(list(answers))

        def run(self, lines):
            for number, outcome in enumerate(super().run(lines)):
                if number == self.die_at:
                    raise MemoryError
                yield outcome

    batch = jobs.run(lines(64))
    first = Recalling(jobs.settings, die_at=10)
    with pytest.raises(MemoryError):
        jobs.drain(runner=first)
    assert first.recalled == [[]]
    second = Recalling(jobs.settings)
    jobs.drain(runner=second)
    assert [len(answers) for answers in second.recalled] == [10]
    assert all(isinstance(text, str) and text for text in second.recalled[0])
    assert jobs.finalize(batch).completed == 64
