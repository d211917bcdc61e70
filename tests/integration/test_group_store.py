"""Leases on groups: order of claims, fencing tokens, taking back, suspects; on two real connections where it matters."""

import threading
from datetime import timedelta

import pytest

from service.adapters.memory import MemoryBlobStore
from service.errors import Unavailable
from tests.bad_input import body, good
from tests.integration.intake import LEASE
from tests.integration.jobs import Jobs, lines, settings_for

NOW = timedelta(0)


@pytest.fixture
def jobs(database, tmp_path):
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path), group_lines=4)


def claim(jobs, worker="w", *, model=None, lease=LEASE, max_lines=4):
    with jobs.database.begin() as uow:
        return list(uow.groups.claim(worker, model=model, lease=lease, max_lines=max_lines))


def tokens(leases):
    return {lease.group_id: lease.token for lease in leases}


def due(jobs):
    with jobs.database.begin() as uow:
        return dict(uow.watch.due())


def test_a_claim_takes_what_fits_and_at_least_one_group(jobs):
    jobs.run(lines(20))
    assert len(claim(jobs, max_lines=1)) == 1
    assert len(claim(jobs, max_lines=9)) == 2
    assert len(claim(jobs, max_lines=100)) == 2
    assert claim(jobs, max_lines=100) == []


def test_priority_then_expiry_then_age(jobs):
    def ready(priority=0, sooner=timedelta(0)):
        batch = jobs.submit(lines(1), priority=priority)
        item = jobs.claim(batch)
        with jobs.database.begin() as uow:
            uow.batches.save(batch.evolve(expires_at=batch.expires_at - sooner))
        jobs.validate(item)
        return batch.id

    late, early, urgent = ready(), ready(sooner=timedelta(hours=1)), ready(priority=5)
    assert [lease.batch_id for lease in claim(jobs, max_lines=100)] == [urgent, early, late]


def test_a_lease_knows_the_task_that_the_batchs_metadata_names(jobs):
    for metadata in ({"task": "mail", "team": "a"}, {"team": "b"}):
        jobs.validate(jobs.claim(jobs.submit(lines(1), metadata=metadata)))
    assert [lease.task for lease in claim(jobs, max_lines=100)] == ["mail", None]


def test_without_a_model_the_one_with_most_to_do_is_taken(jobs):
    jobs.run(lines(4))
    jobs.run(b"\n".join(good(f"c{n}", body=body(model="other")) for n in range(9)))
    first = claim(jobs, max_lines=100)
    assert {lease.model for lease in first} == {"other"}
    assert claim(jobs, model="other", max_lines=100) == []
    assert {lease.model for lease in claim(jobs, max_lines=100)} == {"smollm2-135m"}


def test_two_claims_at_the_same_time_share_and_never_wait(jobs):
    jobs.run(lines(40))
    with jobs.database.begin() as one, jobs.database.begin() as two:
        first = one.groups.claim("one", model=None, lease=LEASE, max_lines=1000)
        second = two.groups.claim("two", model=None, lease=LEASE, max_lines=1000)
    assert len(first) == 10
    assert second == []


def test_a_lease_carries_what_a_worker_needs(jobs):
    batch = jobs.run(lines(2))
    (lease,) = claim(jobs)
    assert (lease.batch_id, lease.project_id, lease.token, lease.suspect) == (batch.id, batch.project_id, 1, False)
    assert lease.input_key.startswith("files/")
    assert len(lease.input_sha256) == 64
    assert (lease.price_version, lease.drafter, lease.endpoint) == (batch.price_version, "auto", batch.endpoint)


def test_only_the_newest_token_is_held(jobs):
    jobs.run(lines(4))
    old = tokens(claim(jobs, lease=NOW))
    with jobs.database.begin() as uow:
        assert uow.groups.renew(old, NOW) == set(old), "it ran out, but nobody took it"
    with jobs.database.begin() as uow:
        assert list(uow.watch.take_back_dead(10)) == list(old)
    new = tokens(claim(jobs, "next"))
    with jobs.database.begin() as uow:
        assert uow.groups.renew(old, LEASE) == set()
        assert uow.groups.lock_held(old) == set()
        uow.groups.release(old)
        assert uow.groups.lock_held(new) == set(new), "a stale release changes nothing"


def test_a_live_lease_is_not_taken_back_and_an_unleased_group_is_not_either(jobs):
    jobs.run(lines(8))
    claim(jobs, max_lines=4)
    with jobs.database.begin() as uow:
        assert list(uow.watch.take_back_dead(10)) == []
    assert due(jobs) == {"smollm2-135m": 1}


def test_a_group_whose_lease_ran_out_is_due_only_once_it_is_taken_back(jobs):
    jobs.run(lines(4))
    claim(jobs, lease=NOW)
    assert claim(jobs) == []
    with jobs.database.begin() as uow:
        uow.watch.take_back_dead(10)
    assert len(claim(jobs)) == 1


def test_the_leases_of_a_dead_worker_are_taken_back_at_once(jobs):
    jobs.run(lines(12))
    dead, alive = claim(jobs, "dead"), claim(jobs, "alive")
    with jobs.database.begin() as uow:
        assert list(uow.watch.take_back_worker("dead")) == [dead[0].group_id]
        assert uow.groups.lock_held(tokens(alive)) == {alive[0].group_id}
    assert due(jobs) == {"smollm2-135m": 2}


def test_a_released_group_rests_if_asked_to(jobs):
    jobs.run(lines(4))
    with jobs.database.begin() as uow:
        uow.groups.release(tokens(uow.groups.claim("w", model=None, lease=LEASE, max_lines=4)), delay=timedelta(hours=1))
    assert due(jobs) == {}
    with jobs.database.begin() as uow:
        assert dict(uow.watch.due_or_leased()) == {"smollm2-135m": 1}


def test_lines_that_were_admitted_too_often_are_set_apart(jobs):
    batch = jobs.run(lines(8))
    held = claim(jobs, max_lines=100)
    with jobs.database.begin() as uow:
        for _ in range(2):
            uow.lines.admit([(batch.id, 1), (batch.id, 6)])
        uow.lines.admit([(batch.id, 2)])
        assert uow.watch.isolate([lease.group_id for lease in held], attempts=2) == 2
        left = uow.lines.pending([lease.group_id for lease in held])
        uow.groups.release(tokens(held))
    assert [line.line_no for line in left] == [2, 3, 4, 5, 7, 8]
    seen = []
    while leases := claim(jobs, max_lines=100):
        with jobs.database.begin() as uow:
            pending = uow.lines.pending([lease.group_id for lease in leases])
        seen.append(([lease.suspect for lease in leases], [line.line_no for line in pending]))
    assert seen == [([False, False], [2, 3, 4, 5, 7, 8]), ([True], [1]), ([True], [6])], "suspects come alone"


def test_a_group_of_suspects_only_is_closed(jobs):
    batch = jobs.run(lines(2))
    (held,) = claim(jobs)
    with jobs.database.begin() as uow:
        for _ in range(2):
            uow.lines.admit([(batch.id, 1), (batch.id, 2)])
        assert uow.watch.isolate([held.group_id], attempts=2) == 2
        assert uow.groups.lock_held(tokens([held])) == set()
        assert uow.watch.open_in(batch.id) == 2
        assert uow.watch.isolate([held.group_id], attempts=2) == 0


def test_closing_a_batch_fences_its_workers_off(jobs):
    batch = jobs.run(lines(12))
    held = claim(jobs)
    with jobs.database.begin() as uow:
        assert uow.groups.close_batch(batch.id) == 3
    with jobs.database.begin() as uow:
        assert uow.groups.lock_held(tokens(held)) == set()
    assert due(jobs) == {}


def test_many_threads_claim_and_release_without_a_deadlock(jobs):
    jobs.run(lines(100))
    errors = []

    def work(name):
        try:
            for _ in range(15):
                leases = claim(jobs, name, max_lines=40)
                with jobs.database.begin() as uow:
                    uow.groups.renew(tokens(leases), LEASE)
                with jobs.database.begin() as uow:
                    uow.groups.release(dict(reversed(tokens(leases).items())))
        except Unavailable as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert due(jobs) == {"smollm2-135m": 25}
