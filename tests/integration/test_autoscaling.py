"""KEDA's query, taken from the manifest and asked of PostgreSQL in each state of a job: it must say due + leased."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import psycopg
import yaml

from service.adapters.unit_of_work import PostgresDatabase
from service.domain.ids import new_batch_id
from service.domain.job import Batch
from service.domain.line import PlannedGroup, StagedLine

KEDA = Path(__file__).parents[2] / "infra" / "k8s" / "base" / "keda.yaml"
LEASE = timedelta(minutes=1)


def _query() -> str:
    scaled = next(document for document in yaml.safe_load_all(KEDA.read_text()) if document["kind"] == "ScaledObject")
    return str(scaled["spec"]["triggers"][0]["metadata"]["query"])


def _batch_with_groups(database: PostgresDatabase, count: int) -> str:
    batch_id = new_batch_id()
    with database.begin() as tx:
        (project,) = tx.accounts.projects()
        tx.batches.add(
            Batch(
                id=batch_id,
                project_id=project.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                created_at=tx.now,
                expires_at=tx.now + timedelta(hours=24),
                price_version=1,
                input_uri="s3://bucket/in.jsonl",
            )
        )
        tx.lines.stage(batch_id, [StagedLine(n, 0, 10, f"line-{n}", model="m") for n in range(1, count + 1)])
        assert tx.groups.plan(batch_id, [PlannedGroup("m", (n,), 10) for n in range(1, count + 1)]) == count
    return batch_id


def test_keda_counts_due_and_leased_groups_in_each_state_of_a_job(database: PostgresDatabase, database_url: str) -> None:
    def asked() -> int:
        with psycopg.connect(database_url) as connection:
            row = connection.execute(_query().encode()).fetchone()
            assert row is not None
            return int(row[0])

    assert asked() == 0, "no job: no worker"
    batch_id = _batch_with_groups(database, 5)
    assert asked() == 5, "all due"
    with database.begin() as tx:
        leases = tx.groups.claim("worker-1", model="m", lease=LEASE, max_lines=3)
    assert len(leases) == 3
    assert asked() == 5, "leased groups keep their workers: a queue's length would say 2"
    with database.begin() as tx:
        tx.groups.release({leases[0].group_id: leases[0].token}, delay=timedelta(hours=1))
    assert asked() == 4, "a group that waits for its retry needs no worker yet"
    with database.begin() as tx:
        assert sum(tx.watch.due_or_leased().values()) >= 4
        tx.groups.close_batch(batch_id)
    assert asked() == 0, "cancelled or finished: down to zero"
