"""How long intake takes and how much memory: `python -m tests.benchmarks.intake [--lines N] [--bytes B] [--json]`.

Writes an input of that size, starts the embedded PostgreSQL, validates and groups the file as the control process would, and
reports seconds, lines a second and the process's peak resident memory (servers apart). Goals: 50,000 lines of 200 MB in 60 s and 300 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import structlog

from service.adapters.blobs_local import LocalBlobStore
from service.adapters.memory import MemoryBuckets
from service.adapters.schema import upgrade
from service.adapters.unit_of_work import PostgresDatabase
from service.config import Limits
from service.domain.account import File, FilePurpose
from service.domain.ids import new_batch_id, new_file_id
from service.domain.job import Batch, BatchStatus
from service.embedded import embedded_servers
from service.ports import BlobStore, Database, OutboxItem, OutboxKind
from service.usecases.validate import validate_batch

ENDPOINT = "/v1/chat/completions"
MODEL = "smollm2-135m"
LEASE = timedelta(seconds=60)
GOAL_SECONDS, GOAL_RSS = 60.0, 300_000_000
SYSTEM_PROMPTS = 20


def input_lines(count: int, total_bytes: int) -> Iterator[bytes]:
    """Chat requests with shared system prompts and text that JSON has to escape, adding up to about `total_bytes`."""
    random_source = random.Random(0)
    words = ["plain", "word", 'with "quotes"', "line\nbreak", "back\\slash", "ünïcode", "a: colon", "{brace}"]
    text = " ".join(random_source.choices(words, k=total_bytes // count // 5))
    size = total_bytes // count
    for number in range(count):
        system = f"You are assistant {number % SYSTEM_PROMPTS}. " + "Answer briefly and name your sources. " * 8
        user = f"Question {number}: "
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        request = {"model": MODEL, "messages": messages, "max_tokens": 64 + number % 64, "temperature": 0}
        record: dict[str, Any] = {"custom_id": f"request-{number}", "method": "POST", "url": ENDPOINT, "body": request}
        missing = size - len(orjson.dumps(record)) - 1
        messages[1]["content"] = user + text[: int(missing * 0.93)]  # escapes take the rest
        yield orjson.dumps(record) + b"\n"


def store_input(blobs: BlobStore, lines: Iterator[bytes]) -> tuple[str, str, int, str]:
    """Streams the lines into the store; returns file id, key, bytes and SHA-256."""
    file_id = new_file_id()
    key, digest, size = f"files/{file_id}/input.jsonl", hashlib.sha256(), 0
    with blobs.writer(key) as writer:
        for line in lines:
            digest.update(line)
            size += len(line)
            writer.write(line)
        writer.commit()
    return file_id, key, size, digest.hexdigest()


def submit(database: Database, file_id: str, key: str, size: int, sha256: str) -> OutboxItem:
    """Creates project, file and batch, and claims the promise to validate it."""
    with database.begin() as uow:
        project = uow.accounts.add_project(f"intake-{file_id}")
        uow.files.add(File(file_id, project.id, FilePurpose.BATCH, "input.jsonl", size, sha256, key, uow.now))
        batch = Batch(
            id=new_batch_id(),
            project_id=project.id,
            endpoint=ENDPOINT,
            completion_window="24h",
            created_at=uow.now,
            expires_at=uow.now + timedelta(hours=24),
            price_version=uow.ledger.price_book().version,
            input_file_id=file_id,
        )
        uow.batches.add(batch)
        uow.outbox.add(OutboxKind.VALIDATE, batch_id=batch.id)
    with database.begin() as uow:
        [item] = uow.outbox.claim("benchmark", kinds=[OutboxKind.VALIDATE], lease=LEASE, limit=1)
    return item


def measure(folder: Path, lines: int, total_bytes: int) -> dict[str, Any]:
    blobs = LocalBlobStore(folder / "blobs")
    file_id, key, size, sha256 = store_input(blobs, input_lines(lines, total_bytes))
    with embedded_servers(folder / "data") as servers:
        upgrade(servers.migration_database_url)
        database = PostgresDatabase(servers.database_url)
        item = submit(database, file_id, key, size, sha256)
        limits = Limits(max_lines=max(lines, 50_000), max_file_bytes=max(size, 200_000_000))
        before = peak_rss()
        start = time.perf_counter()
        validate_batch(
            item, database=database, blobs=blobs, buckets=MemoryBuckets(), limits=limits, resolve_model={MODEL: MODEL}.get, lease=LEASE
        )
        seconds = time.perf_counter() - start
        assert item.batch_id is not None
        with database.begin() as uow:
            batch = uow.batches.load(item.batch_id)
            groups = uow.watch.open_in(item.batch_id)
        database.close()
    if batch.status is not BatchStatus.IN_PROGRESS or batch.total != lines:
        raise RuntimeError(f"validation ended {batch.status.value} with {batch.total} lines: {batch.errors[:3]}")
    return {
        "lines": lines,
        "bytes": size,
        "groups": groups,
        "seconds": round(seconds, 2),
        "lines_per_second": round(lines / seconds),
        "peak_rss_bytes": peak_rss(),
        "peak_rss_bytes_before": before,
        "goal": {"seconds": GOAL_SECONDS, "peak_rss_bytes": GOAL_RSS},
        "pass": seconds <= GOAL_SECONDS and peak_rss() <= GOAL_RSS,
    }


def peak_rss() -> int:
    """Bytes, of this process without its children."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sentence(figures: dict[str, Any]) -> str:
    return (
        f"{figures['lines']:,} lines, {figures['bytes'] / 1e6:.0f} MB -> {figures['groups']} groups in {figures['seconds']} s "
        f"({figures['lines_per_second']:,} lines/s), peak {figures['peak_rss_bytes'] / 1e6:.0f} MB "
        f"(goal: {GOAL_SECONDS:.0f} s, {GOAL_RSS / 1e6:.0f} MB): {'pass' if figures['pass'] else 'FAIL'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=200_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for the figures
    with tempfile.TemporaryDirectory(prefix="longdraft-intake-") as folder:
        figures = measure(Path(folder), options.lines, options.bytes)
    sys.stdout.write((json.dumps(figures) if options.json else sentence(figures)) + "\n")
    return 0 if figures["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
