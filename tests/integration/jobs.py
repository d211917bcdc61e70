"""A job on the real service: input lines, a batch, the control process's steps one by one, and what came out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from service.adapters.standin import StandinRunner
from service.config import Settings, load_settings
from service.domain.job import Batch
from service.domain.result_lines import ResultLine, decode_result
from service.ports import InferenceRunner, OutboxKind
from service.usecases.finalize import finalize_batch
from service.usecases.heartbeat import WorkerIdentity
from service.usecases.run_groups import GroupRunner
from tests.bad_input import MODEL, good
from tests.integration.intake import LEASE, Intake

SHORT = {"lease": 5.0, "heartbeat": 1.0, "sweep": 0.3, "commit_every": 0.1, "relay": 0.05, "shutdown_grace": 5.0}


def settings_for(data_dir: Path, *, standin: Mapping[str, Any] | None = None, timing: Mapping[str, Any] | None = None) -> Settings:
    """Settings with short intervals, the stand-in engine and the model that the test lines name."""
    return load_settings(
        {},
        data_dir=data_dir,
        runner="standin",
        models={MODEL: {"source": MODEL}, "other": {"source": "other"}, "smollm2-135m": {"source": "smollm2-135m"}},
        standin=dict(standin or {}),
        timing={**SHORT, **(timing or {})},
    )


def lines(count: int, **changes: Any) -> bytes:
    """`count` good lines with the custom_ids c1, c2, ..."""
    return b"\n".join(good(f"c{number}", **changes) for number in range(1, count + 1)) + b"\n"


@dataclass
class Jobs(Intake):
    """An intake whose batches can be run and finalised in this process."""

    settings: Settings | None = None

    def worker(
        self,
        name: str = "worker-1",
        *,
        runner: InferenceRunner | None = None,
        stop: threading.Event | None = None,
        age_ns: Callable[[], int] = lambda: 0,
    ) -> GroupRunner:
        assert self.settings is not None
        return GroupRunner(
            WorkerIdentity(name, "host", 1),
            database=self.database,
            blobs=self.blobs,
            runner=runner or StandinRunner(self.settings),
            timing=self.settings.timing,
            group_lines=self.group_lines,
            stop=stop or threading.Event(),
            hint=threading.Event(),
            age_ns=age_ns,
        )

    def drain(self, name: str = "worker-1", **options: Any) -> int:
        """Runs everything that is due; returns how many lines were delivered."""
        with self.worker(name, **options) as worker:
            worker.drain()
        return worker.delivered

    def finalize(self, batch: Batch) -> Batch:
        with self.database.begin() as uow:
            items = uow.outbox.claim("test", kinds=[OutboxKind.FINALIZE], lease=LEASE, limit=1000)
        for item in items:
            finalize_batch(item, database=self.database, blobs=self.blobs, buckets=self.buckets)
        return self.load(batch)

    def complete(self, data: bytes, **options: Any) -> Batch:
        """Submit, validate, run, finalise."""
        batch = self.run(data)
        self.drain(**options)
        return self.finalize(batch)

    def files(self, batch: Batch) -> tuple[list[ResultLine], list[ResultLine]]:
        """The output and the error file, parsed."""
        return self._file(batch, batch.output_file_id), self._file(batch, batch.error_file_id)

    def _file(self, batch: Batch, file_id: str | None) -> list[ResultLine]:
        if file_id is None:
            return []
        with self.database.begin() as uow:
            file = uow.files.get(batch.project_id, file_id)
        assert file is not None
        with self.blobs.open(file.storage_key) as stream:
            return [decode_result(line) for line in stream.read().splitlines()]

    def expire_now(self, batch: Batch) -> None:
        """Moves the end of the completion window into the past."""
        with self.database.begin() as uow:
            uow.batches.save(self.load(batch).evolve(expires_at=uow.now - timedelta(seconds=1)))


def witnessed(path: Path, event: str = "start") -> Sequence[str]:
    """The custom_ids that a stand-in's witness log names for this event, in order."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["custom_id"] for record in records if record["event"] == event]
