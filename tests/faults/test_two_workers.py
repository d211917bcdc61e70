"""More workers on the same PostgreSQL, Valkey and bucket: the work is shared, and no line is done twice."""

from collections import Counter
from datetime import timedelta

from service.ports import ChargeFilter
from tests.integration.jobs import lines


def test_two_workers_each_deliver_at_least_a_quarter(faulty_s3):
    with faulty_s3.control():
        for name in ("one", "two"):
            faulty_s3.worker(name, standin__delay="0.2")
        faulty_s3.wait(lambda: _live(faulty_s3) == 2, "two workers")
        batch = faulty_s3.ended(faulty_s3.jobs.submit(lines(200)))
    with faulty_s3.services.database.begin() as uow:
        rows = uow.costs.work(ChargeFilter(batch.created_at, uow.now, batch_ids=[batch.id]), by=())
    shares = {row.worker: row.lines for row in rows}
    assert set(shares) == {"one", "two"}
    assert min(shares.values()) >= 50, shares
    assert set(faulty_s3.started().values()) == {1}


def test_a_job_of_few_groups_is_shared_too(faulty):
    """Each takes its fair share of what is due, not all that its engine could hold."""
    with faulty.control():
        for name in ("one", "two"):
            faulty.worker(name, standin__capacity="1000", standin__delay="0.5")
        faulty.wait(lambda: _live(faulty) == 2, "two workers")
        batch = faulty.ended(faulty.jobs.submit(lines(64)))
    with faulty.services.database.begin() as uow:
        rows = uow.costs.work(ChargeFilter(batch.created_at, uow.now, batch_ids=[batch.id]), by=())
    assert Counter({row.worker: row.lines for row in rows}) == {"one": 32, "two": 32}


def _live(cluster) -> int:
    with cluster.services.database.begin() as uow:
        return len(uow.workers.live(timedelta(minutes=1)))
