"""The ledger on a real database, and that the oracles see what is wrong."""

from datetime import timedelta

import psycopg
import pytest

from service.adapters.memory import MemoryBlobStore
from service.billing.ledger import charge, reversal
from service.domain.line import LineOutcome, Outcome
from service.domain.money import Rates
from service.domain.usage import Usage
from service.errors import Conflict, InvalidRequest, NotFound
from service.usecases.oracles import check
from tests.integration.jobs import Jobs, lines, settings_for

RATES = Rates(3, 2, 5)


@pytest.fixture
def jobs(database, tmp_path):
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path))


def transaction(batch, line_no=1, usage=None):
    outcome = LineOutcome(batch.id, line_no, 1, "c", Outcome.SUCCEEDED, usage=usage or Usage(10, 4, 7))
    return charge(outcome, project_id=batch.project_id, model="m", rates=RATES, price_version=1)


def test_a_line_is_charged_once(jobs):
    batch = jobs.run(lines(3))
    with jobs.database.begin() as uow:
        uow.ledger.post([transaction(batch, 1), transaction(batch, 2)])
        with pytest.raises(Conflict):
            uow.ledger.post([transaction(batch, 3), transaction(batch, 1)])
        total = uow.ledger.batch_total(batch.id)
    assert total.lines == 2, "nothing of the refused post is written, what came before it is"
    assert total.quantities == {"input": 12, "cached_input": 8, "output": 14}
    assert total.total == 2 * (6 * 3 + 4 * 2 + 7 * 5)


def test_a_reversal_takes_the_line_off_the_bill(jobs):
    batch = jobs.run(lines(2))
    with jobs.database.begin() as uow:
        uow.ledger.post([transaction(batch, 1), transaction(batch, 2)])
        uow.ledger.post([reversal(transaction(batch, 2))])
        total = uow.ledger.batch_total(batch.id)
        assert (total.lines, total.total) == (1, 6 * 3 + 4 * 2 + 7 * 5)


def test_amounts_beyond_64_bits_stay_exact(jobs):
    batch = jobs.run(lines(1))
    huge = Rates(10**15, 10**15, 10**15)
    outcome = LineOutcome(batch.id, 1, 1, "c", Outcome.SUCCEEDED, usage=Usage(10**9, 0, 10**9 + 1))
    with jobs.database.begin() as uow:
        uow.ledger.post([charge(outcome, project_id=batch.project_id, model="m", rates=huge, price_version=1)])
        assert uow.ledger.batch_total(batch.id).total == 10**15 * (2 * 10**9 + 1)


def test_reports_are_grouped_by_tags_too(jobs):
    tagged = jobs.submit(lines(1), metadata={"team": "search"})
    plain = jobs.submit(lines(1))
    with jobs.database.begin() as uow:
        uow.ledger.post([transaction(tagged), transaction(plain)])
        window = {"project_id": None, "start": tagged.created_at, "end": uow.now + timedelta(seconds=1)}
        rows = uow.ledger.report(**window, by=["tag:team", "model"])
        assert [(row.key, row.lines) for row in rows] == [(("search", "m"), 1), (("", "m"), 1)]
        with pytest.raises(InvalidRequest):
            uow.ledger.report(**window, by=["colour"])


def test_prices_are_versions_and_a_batch_keeps_its_own(jobs):
    batch = jobs.run(lines(3))
    with jobs.database.begin() as uow:
        first = uow.ledger.price_book()
        second = uow.ledger.set_prices({"smollm2-135m": Rates(1, 1, 1)})
        assert second.version == first.version + 1
        assert uow.ledger.price_book(first.version) == first
        assert [book.version for book in uow.ledger.price_history()] == [first.version, second.version]
        with pytest.raises(NotFound):
            uow.ledger.price_book(99)
    jobs.drain()
    batch = jobs.finalize(batch)
    assert check(jobs.database, jobs.blobs) == [], "billed at the prices of its creation"
    with jobs.database.begin() as uow:
        usage = uow.batches.load(batch.id).usage
        assert uow.ledger.batch_total(batch.id).total == usage.input_tokens * 20_000_000 + usage.output_tokens * 60_000_000


TAMPERING = {
    "O1": "DELETE FROM lines WHERE line_no = 2",
    "O2": "DELETE FROM ledger_entries WHERE transaction_id = 1; DELETE FROM ledger_transactions WHERE id = 1",
    "O3": "UPDATE ledger_entries SET amount = amount + 1 WHERE transaction_id = 1 AND leg = 0",
    "O4": "UPDATE ledger_entries SET amount = amount + sign(amount) WHERE transaction_id = 1 AND meter IS DISTINCT FROM 'output'",
    "O5": "UPDATE batches SET completed = completed - 1",
    "O6": "UPDATE files SET sha256 = repeat('0', 64) WHERE purpose = 'batch_output'",
    "O7": "UPDATE token_ledger SET prefilled = 0 WHERE line_no = 1",
}


@pytest.mark.parametrize("oracle", TAMPERING)
def test_each_oracle_notices_what_it_is_for(jobs, owner_url, oracle):
    """The owner of the schema, with the triggers off, is the only one who can break the ledger at all."""
    jobs.complete(lines(4))
    assert check(jobs.database, jobs.blobs) == []
    with psycopg.connect(owner_url) as admin:
        admin.execute("SET session_replication_role = replica")
        admin.execute(TAMPERING[oracle])
    found = {violation.oracle for violation in check(jobs.database, jobs.blobs)}
    assert oracle in found
