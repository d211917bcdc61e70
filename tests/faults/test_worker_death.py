"""Rows 1-4, 6-8 and 25 of the fault matrix: workers that die, freeze, are asked to leave, or meet a line that kills them."""

import random
import signal
import time

import pytest

from tests.integration.intake import LEASE
from tests.integration.jobs import lines, witnessed


@pytest.mark.parametrize("fault", ["in_claim:1", "after_segment:3", "in_commit:3", "after_commit:3"])
def test_killed_at_a_point_of_the_protocol(stores, fault):
    """Only lines that were not committed run again, and the bill does not notice."""
    with stores.control():
        batch = stores.jobs.submit(lines(100))
        stores.dies(stores.worker("first", fault=fault))
        safe = stores.committed(batch)
        before = stores.started()
        stores.worker("second")
        batch = stores.ended(batch)
    assert batch.completed == 100
    again = {custom_id for custom_id, times in stores.started().items() if times > before[custom_id] > 0}
    assert not again & safe
    if fault.startswith("after_segment"):
        assert again, "lines of the orphaned segment had to run again"


def test_killed_in_the_middle_of_a_200_line_job(faulty):
    """At any moment: part of a group is saved, part is in the engine."""
    with faulty.control():
        batch = faulty.jobs.submit(lines(200))
        first = faulty.worker("first")
        faulty.wait(lambda: 60 <= len(faulty.committed(batch)) < 200, "a third of the job")
        first.send_signal(signal.SIGKILL)
        faulty.dies(first)
        safe, before = faulty.committed(batch), faulty.started()
        faulty.worker("second")
        batch = faulty.ended(batch)
    assert batch.completed == 200
    after = faulty.started()
    assert set(after) == {f"c{n}" for n in range(1, 201)}
    assert all(after[custom_id] == before[custom_id] for custom_id in safe), "a committed line ran again"
    assert sum(after.values()) - 200 <= 20 + 16 + 16, "more ran twice than can be uncommitted and in the engine"


@pytest.mark.parametrize("seed", [1, 2])
def test_asked_to_leave_at_a_random_point_and_killed_at_another(faulty, seed):
    """A clean leave gives groups back at once and accuses no line; what follows it is picked up without waiting for a lease."""
    moments = random.Random(seed)
    with faulty.control():
        batch = faulty.jobs.submit(lines(150))
        for number, signals in enumerate([(signal.SIGTERM,), (signal.SIGKILL,), (signal.SIGTERM, signal.SIGKILL)]):
            worker = faulty.worker(f"worker-{number}")
            goal = len(faulty.committed(batch)) + 1
            faulty.wait(lambda goal=goal: len(faulty.committed(batch)) >= min(goal, 150), "progress")
            time.sleep(moments.uniform(0, 0.2))
            for which in signals:
                worker.send_signal(which)
                if which is signal.SIGTERM and len(signals) == 1:
                    assert worker.wait(10) == 0
                time.sleep(moments.uniform(0, 0.05))
            worker.wait(10)
        faulty.worker("last")
        assert faulty.ended(batch).completed == 150


def test_a_clean_leave_releases_at_once_and_is_no_attempt(faulty):
    with faulty.control():
        batch = faulty.jobs.submit(lines(64))
        worker = faulty.worker("first", standin__delay="30")
        faulty.wait(lambda: len(faulty.started()) >= 16, "lines in the engine")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
        with faulty.services.database.begin() as uow:
            leases = uow.groups.claim("look", model=None, lease=LEASE, max_lines=64)
            pending = uow.lines.pending([lease.group_id for lease in leases])
            uow.groups.release({lease.group_id: lease.token for lease in leases})
        assert len(pending) == 64
        assert {line.attempts for line in pending} == {0}
        faulty.worker("second")
        assert faulty.ended(batch).completed == 64


def test_killed_by_sigquit_inside_the_commit(faulty):
    with faulty.control():
        batch = faulty.jobs.submit(lines(60))
        faulty.dies(faulty.worker("first", fault="in_commit:2", FAULT_SIGNAL=str(int(signal.SIGQUIT))), signal.SIGQUIT)
        faulty.worker("second")
        assert faulty.ended(batch).completed == 60


def test_a_frozen_worker_wakes_up_to_find_its_lines_taken(faulty):
    """Its late results are refused, and it goes on with other work."""
    with faulty.control():
        batch = faulty.jobs.submit(lines(48))
        frozen = faulty.worker("frozen", standin__delay="0.5")
        faulty.wait(lambda: faulty.started(), "lines in the engine")
        frozen.send_signal(signal.SIGSTOP)
        faulty.worker("second")
        faulty.wait(lambda: len(faulty.committed(batch)) >= 20, "the takeover")
        frozen.send_signal(signal.SIGCONT)
        assert faulty.ended(batch).completed == 48
        other = faulty.jobs.submit(lines(16))
        faulty.workers[1].send_signal(signal.SIGTERM)
        assert faulty.workers[1].wait(10) == 0
        assert faulty.ended(other).completed == 16


@pytest.mark.parametrize("fault", ["in_claim:1", "in_commit:2", "in_beat:1"])
def test_a_worker_that_freezes_inside_a_transaction_keeps_no_locks(faulty, fault):
    """Its connection stays open, and with it the rows it locked: the database must end that transaction in time for the takeover."""
    with faulty.control():
        batch = faulty.jobs.submit(lines(48))
        frozen = faulty.worker("frozen", standin__delay="0.5", fault=fault, FAULT_SIGNAL=str(int(signal.SIGSTOP)))
        faulty.wait(frozen.stopped, "the freeze")
        faulty.worker("second")
        assert faulty.ended(batch).completed == 48
        faulty.workers[1].send_signal(signal.SIGTERM)
        assert faulty.workers[1].wait(10) == 0
        frozen.send_signal(signal.SIGCONT)
        other = faulty.jobs.submit(lines(16))
        assert faulty.ended(other).completed == 16


@pytest.mark.parametrize("how", ["sigkill", "exit", "memory"])
def test_a_line_that_kills_the_engine_is_found_and_the_others_finish(faulty, how):
    """Three deaths: two in company, one alone. A supervisor's restarts are played by this test."""
    with faulty.control():
        batch = faulty.jobs.submit(lines(40))
        deaths = 0
        while not faulty.jobs.load(batch).status.terminal and deaths < 6:
            worker = faulty.worker(f"worker-{deaths}", standin__die_on="c7", standin__die_how=how)
            faulty.wait(lambda worker=worker: worker.poll() is not None or faulty.jobs.load(batch).status.terminal, "a death or the end")
            if worker.poll() is not None:
                deaths += 1
                with faulty.services.database.begin() as uow:
                    uow.watch.take_back_worker(f"worker-{deaths - 1}")
        batch = faulty.ended(batch)
    output, errors = faulty.jobs.files(batch)
    assert [line.custom_id for line in errors] == ["c7"]
    assert errors[0].error_code == "worker_crashed"
    assert len(output) == 39
    assert deaths == 3
    assert witnessed(faulty.witness).count("c7") == 3


@pytest.mark.parametrize("skew", ["3600", "-3600"])
def test_a_worker_whose_clock_is_an_hour_off(faulty, skew):
    """Leases, expiry and due times are the database's."""
    with faulty.control():
        batch = faulty.jobs.submit(lines(60))
        faulty.worker("skewed", FAULT_CLOCK=skew)
        faulty.worker("straight")
        assert faulty.ended(batch).completed == 60
