"""A big job end to end with the stand-in engine: `python -m tests.benchmarks.load [--lines N] [--workers W] [--json]`.

Real PostgreSQL and Valkey, the directory store, the control process in this process, workers as processes of their own. Reports seconds
of each part, committed results a second, how far the control process's peak memory grew, the worker's memory, and what the billing
oracles find.
Goals for 50,000 lines: 5 minutes, and 500 committed results a second.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import structlog

from service.adapters.schema import upgrade
from service.domain.job import Batch
from service.embedded import embedded_servers
from service.usecases.oracles import check
from tests.faults.cluster import Cluster, cluster
from tests.integration.jobs import lines

GOAL_SECONDS, GOAL_RATE = 300.0, 500.0
CAPACITY = "256"


def measure(count: int, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="longdraft-load-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root the servers run as another user
        with embedded_servers(folder) as servers:
            upgrade(servers.migration_database_url)
            urls = {"database_url": servers.database_url, "broker_url": servers.broker_url, "blob_url": f"file://{folder}/objects"}
            with cluster(folder, **urls) as running:
                return _measure(running, count, workers)


def _measure(running: Cluster, count: int, workers: int) -> dict[str, Any]:
    group = {"group_lines": "64", "standin__capacity": CAPACITY, "standin__delay": "0", "timing__commit_lines": "100"}
    slow = {"timing__lease": "60", "timing__heartbeat": "15", "timing__commit_every": "3"}
    running.jobs.group_lines = 64
    data = lines(count)
    before = _peak_rss()  # writing the input takes memory that the service does not
    with running.control():
        processes = [running.worker(f"worker-{number}", **group, **slow) for number in range(workers)]
        started = time.perf_counter()
        batch = _wait(running, running.jobs.submit(data), processes)
        seconds = time.perf_counter() - started
        rss = [psutil.Process(worker.process.pid).memory_info().rss for worker in processes]
    assert batch.in_progress_at is not None
    assert batch.finalizing_at is not None
    assert batch.completed_at is not None
    run = (batch.finalizing_at - batch.in_progress_at).total_seconds()
    return {
        "lines": count,
        "workers": workers,
        "seconds": round(seconds, 2),
        "validate_seconds": round((batch.in_progress_at - batch.created_at).total_seconds(), 2),
        "run_seconds": round(run, 2),
        "finalize_seconds": round((batch.completed_at - batch.finalizing_at).total_seconds(), 2),
        "results_per_second": round(count / run, 1),
        "control_growth_bytes": _peak_rss() - before,
        "worker_rss_bytes": max(rss),
        "violations": [str(violation) for violation in check(running.services.database, running.services.blobs, batch.id)],
        "goals": {"seconds": GOAL_SECONDS, "results_per_second": GOAL_RATE},
    }


def _peak_rss() -> int:
    """Of this process, which is the control process too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(running: Cluster, batch: Batch, processes: list[Any]) -> Batch:
    while not (now := running.jobs.load(batch)).status.terminal:
        assert all(worker.poll() is None for worker in processes), running.log.read_text()[-2000:]
        time.sleep(0.1)
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    report = measure(options.lines, options.workers)
    text = json.dumps(report) if options.json else "\n".join(f"{name:24} {value}" for name, value in report.items())
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
