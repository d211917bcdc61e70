"""A batch with a cap ends under it, with what it has; only delivered lines are billed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from service.adapters.memory import MemoryBlobStore
from service.adapters.standin import StandinRunner
from service.billing.spending import CAP_REACHED
from service.domain.job import Batch, BatchStatus
from service.domain.line import LineOutcome, LineWork
from service.domain.money import Reservation
from service.domain.usage import Usage
from service.usecases.oracles import check
from tests.bad_input import MODEL
from tests.integration.jobs import Jobs, lines, settings_for


def body(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "count to ten"}], **changes}


@pytest.fixture
def jobs(database: Any, tmp_path: Any) -> Jobs:
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path, standin={"capacity": 16, "answer_bytes": 64}))


def run_capped(jobs: Jobs, count: int, cap: int | None, *, runner: Any = None, **changes: Any) -> Batch:
    batch = jobs.submit(lines(count, body=body(**changes)), max_cost=cap)
    jobs.validate(jobs.claim(batch))
    jobs.drain(runner=runner)
    return jobs.finalize(batch)


def charged(jobs: Jobs, batch: Batch) -> int:
    with jobs.database.begin() as uow:
        return uow.ledger.batch_total(batch.id).total


def reservations(jobs: Jobs, batch: Batch) -> int:
    with jobs.database.begin() as uow:
        room = uow.spending.room(batch.id)
        assert room is not None
        assert batch.max_cost is not None
        return batch.max_cost - room - uow.ledger.batch_total(batch.id).total


@pytest.fixture
def price_of_a_line(jobs: Jobs) -> int:
    batch = run_capped(jobs, 1, None, max_tokens=16)
    return charged(jobs, batch)


def test_it_ends_under_its_cap_with_what_it_has(jobs: Jobs, price_of_a_line: int) -> None:
    cap = 20 * price_of_a_line + 1
    batch = run_capped(jobs, 60, cap, max_tokens=16)
    output, errors = jobs.files(batch)
    assert batch.status is BatchStatus.COMPLETED
    assert charged(jobs, batch) == price_of_a_line * len(output) <= cap
    # The last line runs while its worst case fits: what is left is less than one worst case (three lines here).
    assert len(output) > 16
    assert [line.error_code for line in errors] == [CAP_REACHED] * (60 - len(output))
    assert reservations(jobs, batch) == 0
    assert check(jobs.database, jobs.blobs) == []


def test_a_cap_that_is_never_reached_changes_nothing(jobs: Jobs, price_of_a_line: int) -> None:
    batch = run_capped(jobs, 30, 100 * price_of_a_line, max_tokens=16)
    assert (batch.completed, batch.failed) == (30, 0)
    assert charged(jobs, batch) == 30 * price_of_a_line


def test_a_cap_below_one_line_runs_nothing(jobs: Jobs, price_of_a_line: int) -> None:
    batch = run_capped(jobs, 5, price_of_a_line - 1, max_tokens=16)
    assert (batch.completed, batch.failed, charged(jobs, batch)) == (0, 5, 0)
    assert batch.output_file_id is None


def test_an_answer_without_a_limit_is_reserved_at_the_whole_context(jobs: Jobs) -> None:
    batch = run_capped(jobs, 3, 4096 * 60_000_000)
    assert batch.completed == 0, "the prompt comes on top of a full context's answer"
    assert run_capped(jobs, 3, 4096 * 63_000_000).completed == 3


class Glutton:
    """Uses far more prompt tokens than its lines have bytes, as a chat template with a long preamble would."""

    def __init__(self, runner: StandinRunner, tokens: int) -> None:
        self._runner, self._tokens = runner, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, works: Iterable[LineWork | None]) -> Iterator[LineOutcome]:
        for outcome in self._runner.run(works):
            usage = Usage(self._tokens, 0, outcome.usage.output_tokens)
            assert outcome.body is not None
            told = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens, "total_tokens": usage.total_tokens}
            work = replace(outcome.work, prompt=self._tokens, prefilled=self._tokens)
            yield replace(outcome, usage=usage, work=work, body={**outcome.body, "usage": told})


def test_lines_that_outgrow_their_reservation_are_stopped_at_the_commit(jobs: Jobs, price_of_a_line: int) -> None:
    assert jobs.settings is not None
    cap = 20 * price_of_a_line
    glutton = Glutton(StandinRunner(jobs.settings), 5_000)
    batch = run_capped(jobs, 40, cap, runner=glutton, max_tokens=16)
    assert batch.status is BatchStatus.COMPLETED
    assert batch.failed > 0
    assert charged(jobs, batch) <= cap
    _, errors = jobs.files(batch)
    assert {line.error_code for line in errors} == {CAP_REACHED}
    assert check(jobs.database, jobs.blobs) == []


def test_two_workers_share_one_cap(jobs: Jobs, price_of_a_line: int) -> None:
    cap = 20 * price_of_a_line
    batch = jobs.submit(lines(120, body=body(max_tokens=16)), max_cost=cap)
    jobs.group_lines = 8
    jobs.validate(jobs.claim(batch))
    threads = [threading.Thread(target=jobs.drain, kwargs={"name": f"worker-{n}"}) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batch = jobs.finalize(batch)
    assert batch.status is BatchStatus.COMPLETED
    assert 16 * price_of_a_line < charged(jobs, batch) <= cap
    assert check(jobs.database, jobs.blobs) == []


def test_what_a_dead_worker_held_is_free_again(jobs: Jobs, price_of_a_line: int) -> None:
    cap = 20 * price_of_a_line
    batch = jobs.submit(lines(4, body=body(max_tokens=16)), max_cost=cap)
    jobs.validate(jobs.claim(batch))
    with jobs.database.begin() as uow:
        (lease,) = uow.groups.claim("dead", model=None, lease=timedelta(seconds=60), max_lines=64)
        assert lease.capped
        held = uow.spending.reserve(batch.id, [Reservation(1, lease.group_id, lease.token, cap)])
        assert held.granted == {1}
        again = uow.spending.reserve(batch.id, [Reservation(2, lease.group_id, lease.token, 1)])
        assert again.waiting == {2}
    with jobs.database.begin() as uow:
        uow.watch.take_back_worker("dead")
    jobs.drain()
    assert jobs.finalize(batch).completed == 4


def test_the_audit_sees_a_cap_that_was_passed(jobs: Jobs, price_of_a_line: int) -> None:
    batch = run_capped(jobs, 3, 100 * price_of_a_line, max_tokens=16)
    with jobs.database.begin() as uow:
        assert uow.ledger.violations(batch.id) == []
        uow.batches.save(uow.batches.load(batch.id).evolve(max_cost=3 * price_of_a_line - 1))
    with jobs.database.begin() as uow:
        assert [finding[:2] for finding in uow.ledger.violations(batch.id)] == ["O4"]
