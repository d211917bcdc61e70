"""A hundred batches at once: `python -m tests.benchmarks.many_batches [--batches N] [--lines N] [--json]`.

One `longdraft up` with the stand-in engine, as processes of their own. All batches are created over HTTP, then the status of each is asked
for again and again until all have ended. Goal: p95 of a status request <= 100 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from tests.integration.test_up import Machine, job

GOAL_P95 = 0.1
ENDED = ("completed", "failed", "expired", "cancelled")


def measure(folder: Path, batches: int, lines: int) -> dict[str, Any]:
    machine = Machine(folder, LONGDRAFT_STANDIN__DELAY="0.02", LONGDRAFT_STANDIN__CAPACITY="128")
    with machine.up() as (_, server):
        headers = {"authorization": f"Bearer {server['api_key']}"}
        with httpx.Client(base_url=f"{server['base_url']}/", headers=headers, timeout=60) as client:
            content = job(folder / "in.jsonl", lines).read_bytes()
            file = client.post("files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}).raise_for_status().json()
            started = time.monotonic()
            ids = [_create(client, file["id"], number) for number in range(batches)]
            created = time.monotonic() - started
            times, rounds = _poll(client, ids)
            seconds = time.monotonic() - started
    p95 = quantiles(times, n=20)[-1]
    return {
        "batches": batches,
        "lines": batches * lines,
        "create_seconds": round(created, 2),
        "seconds": round(seconds, 2),
        "status_requests": len(times),
        "rounds": rounds,
        "status_median_ms": round(median(times) * 1000, 1),
        "status_p95_ms": round(p95 * 1000, 1),
        "load": round(os.getloadavg()[0], 2),
        "pass": p95 <= GOAL_P95,
    }


def _create(client: httpx.Client, file_id: str, number: int) -> str:
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": {"number": str(number)}}
    return str(client.post("batches", json=body).raise_for_status().json()["id"])


def _poll(client: httpx.Client, ids: list[str]) -> tuple[list[float], int]:
    """Seconds of every status request, and how many rounds over all batches there were."""
    times: list[float] = []
    open_ids, rounds = list(ids), 0
    while open_ids:
        rounds += 1
        still_open = []
        for batch_id in open_ids:
            started = time.perf_counter()
            batch = client.get(f"batches/{batch_id}").raise_for_status().json()
            times.append(time.perf_counter() - started)
            if batch["status"] not in ENDED:
                still_open.append(batch_id)
            else:
                assert batch["request_counts"]["completed"] == batch["request_counts"]["total"], batch
        open_ids = still_open
    return times, rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--lines", type=int, default=50, help="of each batch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longdraft-many-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # as root the servers run as another user
        report = measure(folder, options.batches, options.lines)
    sys.stdout.write((json.dumps(report) if options.json else "\n".join(f"{key:20} {value}" for key, value in report.items())) + "\n")
    return 0 if report["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
