"""Where a worker's time goes: a real engine on a tiny model, a job of its own, and every nanosecond accounted for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from service.adapters.engine_runner import EngineRunner
from service.adapters.memory import MemoryBlobStore
from service.billing.operator import HourlyRates
from service.config import EngineSettings, ModelEntry
from service.domain.job import BatchStatus
from service.domain.line import LineOutcome
from service.usecases.cost_report import cost_report, worker_report
from tests.bad_input import MODEL, body
from tests.integration.jobs import Jobs, lines, settings_for
from tests.tiny_model import make_tiny_model

RATES = HourlyRates.parse({"cpu": "3.60"})
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def jobs(database: Any, tmp_path: Path) -> Jobs:
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path))


@pytest.fixture
def runner(folder: Path, tmp_path: Path) -> EngineRunner:
    settings = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=8, threads=1)
    return EngineRunner({MODEL: ModelEntry(source=str(folder))}, settings, tmp_path)


def test_attributed_idle_load_and_profile_make_up_the_wall_time(jobs: Jobs, runner: EngineRunner) -> None:
    data = lines(40, body=body(max_tokens=24, temperature=0))
    batch = jobs.run(data)
    with jobs.worker(runner=runner) as worker:
        worker.drain()
        time.sleep(0.2)  # nothing to do: idle
    assert jobs.finalize(batch).status is BatchStatus.COMPLETED
    now = datetime.now(UTC)
    (line,) = worker_report(jobs.database, now - DAY, now + DAY, RATES)
    assert line.attributed_ns > 0
    assert line.load_ns > 0
    assert line.idle_ns >= 200_000_000
    whole = line.attributed_ns + line.load_ns + line.profile_ns + line.idle_ns
    # A busy machine may take the processor away for a moment between two of the readings.
    assert abs(line.wall_ns - whole) <= 0.005 * line.wall_ns + 20_000_000
    assert line.lost_ns == 0
    assert line.cost is not None
    assert line.cost * 3600 * 10**9 == 36 * 10**14 * line.wall_ns
    (row,) = cost_report(jobs.database, start=now - DAY, end=now + DAY, by=["batch"], rates=RATES)
    assert row.work.device_ns == line.attributed_ns
    assert row.cost is not None
    assert row.cost < line.cost
    assert row.work.modelled_ns > 0
    assert row.work.plain_ns > 0


class Breaking:
    """Breaks down after a few lines, in the middle of the others."""

    def __init__(self, runner: EngineRunner, after: int) -> None:
        self._runner, self._after = runner, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, works: Any) -> Iterator[LineOutcome]:
        yield from islice(self._runner.run(works), self._after)
        raise RuntimeError("out of order")


def test_work_that_is_delivered_to_no_one_is_lost_to_the_operator(jobs: Jobs, runner: EngineRunner) -> None:
    batch = jobs.run(lines(16, body=body(max_tokens=8, temperature=0)))
    broken: Any = Breaking(runner, 3)
    with pytest.raises(RuntimeError, match="out of order"):
        jobs.drain(runner=broken)
    jobs.drain(name="worker-2", runner=runner)
    assert jobs.finalize(batch).completed == 16
    now = datetime.now(UTC)
    first, second = worker_report(jobs.database, now - DAY, now + DAY, RATES)
    assert first.lost_ns > 0
    assert second.lost_ns == 0
    assert first.attributed_ns + first.lost_ns == first.busy_ns
    (row,) = cost_report(jobs.database, start=now - DAY, end=now + DAY, by=["project"], rates=RATES)
    assert row.work.device_ns == first.attributed_ns + second.attributed_ns
