"""Loads of models: how a start was spent, the profile that is measured once, and a model that does not fit."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints import loader
from service.adapters.blobs_local import LocalBlobStore
from service.adapters.engine_runner import EngineRunner
from service.adapters.memory import MemoryBlobStore
from service.adapters.shared_cache import BlobFolders
from service.config import EngineSettings, ModelEntry
from service.domain.job import BatchStatus
from service.errors import ModelUnavailable
from service.ports import LoadRow, Refusals
from service.usecases.cost_report import load_report
from service.usecases.starts import hopeless
from service.usecases.status import BatchViews
from tests.bad_input import MODEL, body
from tests.integration.jobs import Jobs, lines, settings_for
from tests.tiny_model import make_tiny_model

DAY = timedelta(days=1)
SMALL = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=8, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def jobs(database: Any, tmp_path: Path) -> Jobs:
    settings = settings_for(tmp_path, timing={"model_retry": 0.1})
    return Jobs(database, MemoryBlobStore(), settings=settings)


def runner(folder: Path, cache: Path, **options: Any) -> EngineRunner:
    return EngineRunner({MODEL: ModelEntry(source=str(folder))}, SMALL, cache, **options)


def loads(jobs: Jobs) -> list[LoadRow]:
    now = datetime.now(UTC)
    with jobs.database.begin() as uow:
        return list(uow.loads.between(now - DAY, now + DAY))


def test_a_start_is_split_and_the_second_one_finds_the_profile(jobs: Jobs, folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        batch = jobs.run(lines(4, body=body(max_tokens=4, temperature=0)))
        with jobs.worker(name, runner=runner(folder, tmp_path), age_ns=lambda: 10**8) as worker:
            worker.drain()
        assert jobs.finalize(batch).completed == 4
    (cold, split_cold), (warm, split_warm) = load_report(jobs.database, datetime.now(UTC) - DAY, datetime.now(UTC) + DAY)
    assert (cold.load.worker_id, cold.load.profile_reused) == ("first", False)
    assert (warm.load.worker_id, warm.load.profile_reused) == ("second", True)
    assert cold.load.profile_ns > warm.load.profile_ns
    for row, parts in ((cold, split_cold), (warm, split_warm)):
        assert row.load.batch_id
        assert parts is not None
        assert min(row.load.load_ns, row.prefill_ns, row.decode_ns) > 0
        assert parts.total > parts.load + parts.profile + parts.prefill
        assert abs(parts.other) < parts.total


def test_a_machine_that_starts_from_nothing_takes_the_profile_from_the_shared_cache(folder: Path, tmp_path: Path) -> None:
    shared = BlobFolders(LocalBlobStore(tmp_path / "bucket"))
    reused = []
    for machine in ("one", "two"):
        made = runner(folder, tmp_path / machine, shared=shared)
        made.load(MODEL)
        reused.append(made.stats().profile_reused)
        made.close()
    assert reused == [False, True]


def test_a_spoilt_profile_is_measured_again(folder: Path, tmp_path: Path) -> None:
    made = runner(folder, tmp_path)
    made.load(MODEL)
    (file,) = (tmp_path / "profiles").glob("*/steps.json")
    file.write_text("[[1, 1")
    made.close()
    made.load(MODEL)
    assert not made.stats().profile_reused
    made.close()


def test_a_model_that_does_not_fit_says_so_and_its_lines_do_not_wait_for_ever(
    jobs: Jobs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: 100_000)
    too_large = runner(folder, tmp_path)
    with pytest.raises(ModelUnavailable, match=r"needs 0\.00 GiB on cpu \(weights .* and 0\.00 GiB are available") as refusal:
        too_large.load(MODEL)
    assert refusal.value.lasting
    batch = jobs.run(lines(5))
    views = BatchViews()
    for refused in range(1, 4):
        jobs.drain(runner=too_large)
        assert [row.load.lasting for row in loads(jobs)] == [True] * refused
        if refused < 3:
            view = views.get(jobs.database, jobs.project.id, batch.id).batch
            assert view.status is BatchStatus.IN_PROGRESS
            (error,) = view.errors
            assert error.code == "model_unavailable"
            assert "GiB are available" in error.message
            time.sleep(0.15)
    batch = jobs.finalize(batch)
    assert (batch.status, batch.completed, batch.failed) == (BatchStatus.COMPLETED, 0, 5)
    _, errors = jobs.files(batch)
    assert {line.error_code for line in errors} == {"model_unavailable"}
    assert "GiB are available" in str(errors[0].error_message)
    with jobs.database.begin() as uow:
        assert uow.ledger.batch_total(batch.id).total == 0
        assert uow.monitor.backlog(DAY).refused == [MODEL]


def test_a_model_that_some_worker_could_load_is_waited_for(
    jobs: Jobs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = runner(folder, tmp_path)
    jobs.run(lines(1, body=body(max_tokens=1)))
    jobs.drain(runner=good)
    monkeypatch.setattr(loader, "free_bytes", lambda device: 100_000)
    batch = jobs.run(lines(2, body=body(max_tokens=1)))
    for _ in range(4):
        jobs.drain("small", runner=runner(folder, tmp_path))
        time.sleep(0.12)
    assert jobs.load(batch).failed == 0
    monkeypatch.undo()
    jobs.drain("large", runner=runner(folder, tmp_path))
    assert jobs.finalize(batch).completed == 2
    assert BatchViews().get(jobs.database, jobs.project.id, batch.id).batch.errors == ()


def test_reasons_that_may_pass_are_waited_for_ten_times_as_long() -> None:
    assert hopeless(Refusals(count=3, lasting=3), 3)
    assert not hopeless(Refusals(count=29, lasting=2), 3)
    assert hopeless(Refusals(count=30, lasting=0), 3)
