"""The service in parts that can be killed one by one: real servers, a control process in a thread, workers as processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from service.bootstrap import Services, open_services
from service.config import load_settings
from service.control import run_control
from service.domain.job import Batch, BatchStatus
from service.errors import Unavailable
from service.ports import TaskQueue
from service.usecases.oracles import check
from tests.faults import saboteur
from tests.integration.jobs import SHORT, Jobs, witnessed

LIMIT = 60.0
"""Seconds that anything may take here: lease + sweep + work are a few."""


_forkserver = multiprocessing.get_context("forkserver")
"""Workers are processes of their own, forked from one that has only done the imports: a start takes milliseconds."""
_forkserver.set_forkserver_preload(
    ["tests.faults.saboteur", "service.adapters.unit_of_work", "service.adapters.standin", "service.adapters.blobs_s3", "celery.worker"]
)


@dataclass
class Worker:
    """A worker process, with subprocess's words for it."""

    process: multiprocessing.process.BaseProcess

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def stopped(self) -> bool:
        """Whether a signal stopped it and none let it go on yet."""
        return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED


@dataclass
class Cluster:
    """`jobs` submits and looks; `control()` runs the control process for a block; `worker()` starts a worker process."""

    services: Services
    environment: dict[str, str]
    folder: Path
    jobs: Jobs = field(init=False)
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wait(lambda: self.services.database.ping() or True, "an answer of the database")
        self.jobs = Jobs(self.services.database, self.services.blobs, settings=self.services.settings)

    @property
    def witness(self) -> Path:
        return self.folder / "witness.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "workers.log"

    @contextmanager
    def control(self, queue: TaskQueue | None = None) -> Iterator[None]:
        services = Services(self.services.settings, self.services.database, self.services.blobs, queue or self.services.queue)
        stop = threading.Event()
        thread = threading.Thread(target=run_control, args=(services, stop))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def worker(self, name: str = "worker", *, fault: str = "", **changes: str) -> Worker:
        """`fault`: where it kills itself (see saboteur.py). `changes`: further settings, without their prefix, or FAULT_ variables."""
        named = {key if key.startswith("FAULT") else f"LONGDRAFT_{key.upper()}": value for key, value in changes.items()}
        environment = {**self.environment, "FAULT": fault, **named}
        process = _forkserver.Process(target=saboteur.run, args=(name, environment, str(self.log)), daemon=True)
        process.start()
        worker = Worker(process)
        self.workers.append(worker)
        return worker

    def dies(self, worker: Worker, number: int = signal.SIGKILL) -> None:
        """Waits for a worker's death by this signal."""
        assert worker.wait(LIMIT) == -number, self.log.read_text()[-3000:]

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """What the condition is once it is true. An outage while looking is no answer."""
        deadline = time.monotonic() + LIMIT
        while True:
            with contextlib.suppress(Unavailable):
                if found := condition():
                    return found
            assert time.monotonic() < deadline, f"{what} did not happen. {self.log.read_text()[-3000:] if self.log.exists() else ''}"
            time.sleep(0.02)

    def ended(self, batch: Batch, status: BatchStatus = BatchStatus.COMPLETED) -> Batch:
        """The batch once it has ended; every oracle must hold then."""
        self.wait(lambda: self.jobs.load(batch).status.terminal, "the end of the batch")
        batch = self.wait(lambda: self.jobs.load(batch), "a look at it")
        assert batch.status is status
        (violations,) = self.wait(lambda: [check(self.services.database, self.services.blobs, batch.id)], "a look at the oracles")
        assert violations == []
        return batch

    def started(self) -> Counter[str]:
        """How often each line entered an engine."""
        return Counter(witnessed(self.witness)) if self.witness.exists() else Counter()

    def committed(self, batch: Batch) -> set[str]:
        """The custom_ids of delivered lines."""
        with self.services.database.begin() as uow:
            return {custom_id for _, custom_id, stored in uow.results.in_order(batch.id) if stored is not None and custom_id}

    def stop(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait(LIMIT)


@contextmanager
def cluster(folder: Path, *, database_url: str, broker_url: str, blob_url: str, s3: dict[str, str] | None = None) -> Iterator[Cluster]:
    environment = {
        "LONGDRAFT_DATA_DIR": str(folder),
        "LONGDRAFT_DATABASE_URL": database_url,
        "LONGDRAFT_BROKER_URL": broker_url,
        "LONGDRAFT_BLOB_URL": blob_url,
        "LONGDRAFT_RUNNER": "standin",
        "LONGDRAFT_STANDIN__WITNESS": str(folder / "witness.jsonl"),
        "LONGDRAFT_STANDIN__CAPACITY": "16",
        "LONGDRAFT_STANDIN__DELAY": "0.05",
        "LONGDRAFT_GROUP_LINES": "16",
        **{f"LONGDRAFT_TIMING__{name.upper()}": str(value) for name, value in {**SHORT, "lease": 2.0, "heartbeat": 0.4}.items()},
        "LONGDRAFT_TIMING__COMMIT_LINES": "20",
        **{f"LONGDRAFT_S3__{name.upper()}": value for name, value in (s3 or {}).items()},
    }
    settings = load_settings(environment)
    with open_services(settings) as services:
        running = Cluster(services, environment, folder)
        running.jobs.group_lines = settings.group_lines
        try:
            yield running
        finally:
            running.stop()
