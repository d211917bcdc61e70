"""The worker's pull on a real database, with the stand-in engine."""

import pytest

from service.adapters.memory import MemoryBlobStore
from service.billing.reports import cost_json
from service.domain.job import BatchStatus
from service.usecases.oracles import check
from service.usecases.report import batch_cost
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
