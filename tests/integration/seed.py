"""Delivered batches without running any: what reports are tested on."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import psycopg

from service.billing.ledger import charge
from service.domain.account import File, FilePurpose, Project
from service.domain.ids import new_batch_id, new_file_id
from service.domain.job import Batch, BatchStatus
from service.domain.line import LineOutcome, Outcome, PlannedGroup, Segment, StagedLine
from service.domain.result_lines import pack_results
from service.domain.usage import Usage, Work
from service.ports import BlobStore, Database

ENDPOINT = "/v1/chat/completions"


@dataclass
class Seed:
    """Writes what a batch leaves behind: input, lines, results, token ledgers, charges."""

    database: Database
    owner_url: str
    blobs: BlobStore | None = None
    projects: dict[str, Project] = field(default_factory=dict)

    def project(self, name: str) -> Project:
        if name not in self.projects:
            with self.database.begin() as uow:
                self.projects[name] = uow.accounts.add_project(name)
        return self.projects[name]

    def deliver(
        self,
        project: str,
        usages: Sequence[Usage],
        *,
        model: str = "smollm2-135m",
        metadata: Mapping[str, str] | None = None,
        works: Sequence[Work] | None = None,
        worker: str | None = None,
        at: datetime | None = None,
    ) -> str:
        """A completed batch with one line a usage; its id. `at` back-dates the charges (only the owner's trick can)."""
        project_id = self.project(project).id
        batch_id, file_id = new_batch_id(), new_file_id()
        works = works or [
            Work(
                prompt=u.input_tokens, cached=u.cached_tokens, prefilled=u.input_tokens, generated=u.output_tokens, sampled=u.output_tokens
            )
            for u in usages
        ]
        numbers = range(1, len(usages) + 1)
        outcomes = [
            LineOutcome(batch_id, n, None, str(n), Outcome.SUCCEEDED, 200, {"n": n}, usage=usage, work=work)
            for n, usage, work in zip(numbers, usages, works, strict=True)
        ]
        data, placed = pack_results(outcomes)
        segment = Segment(f"segments/{batch_id}/{uuid.uuid4().hex}.jsonl", batch_id, len(data), hashlib.sha256(data).hexdigest(), worker)
        if self.blobs is not None:
            self.blobs.put(segment.key, data)
        with self.database.begin() as uow:
            uow.files.add(File(file_id, project_id, FilePurpose.BATCH, "in.jsonl", 1, "0" * 64, f"files/{file_id}/in", uow.now))
            book = uow.ledger.price_book()
            batch = Batch(
                id=batch_id,
                project_id=project_id,
                endpoint=ENDPOINT,
                completion_window="24h",
                created_at=uow.now,
                expires_at=uow.now + timedelta(hours=24),
                price_version=book.version,
                input_file_id=file_id,
                metadata=metadata or {},
                model=model,
                total=len(usages),
            )
            uow.batches.add(batch)
            uow.lines.stage(batch_id, [StagedLine(n, n, 1, str(n), model) for n in numbers])
            uow.groups.plan(batch_id, [PlannedGroup(model, tuple(numbers), 1)])
            commit_no = uow.batches.count(batch_id, completed=len(usages), failed=0, usage=sum(usages, Usage()))
            uow.results.add(segment, placed, commit_no)
            rates = book.rates(model)
            uow.ledger.post([charge(o, project_id=project_id, model=model, rates=rates, price_version=book.version) for o in outcomes])
            uow.groups.close_batch(batch_id)
            uow.batches.save(batch.evolve(status=BatchStatus.COMPLETED))
        if at is not None:
            self._back_date(batch_id, at)
        return batch_id

    def _back_date(self, batch_id: str, at: datetime) -> None:
        """Only the owner of the tables can switch their triggers off."""
        with psycopg.connect(self.owner_url) as connection:
            for table in ("ledger_transactions", "line_results"):
                trigger = "permanent" if table == "ledger_transactions" else "no_update"
                connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER {trigger}")
                connection.execute(f"UPDATE {table} SET created_at = %s WHERE batch_id = %s", (at, batch_id))
                connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER {trigger}")
