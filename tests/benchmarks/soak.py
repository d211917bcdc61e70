"""A long run with a worker killed every few seconds: `python -m tests.benchmarks.soak [--minutes M] [--requests N] [--kill-every S]`.

One `longdraft up` with the stand-in engine; jobs of a thousand lines follow each other until the requests or the minutes are over, and
workers die by SIGKILL all the while. Then every batch must be complete, no oracle broken, and the memory of the service flat.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.integration.test_up import Machine, job

JOB_LINES = 1000
IN_FLIGHT = 4
GROWTH = 1.25
"""Memory at the end against that after the first jobs."""


class Soak:
    """Keeps jobs in flight and kills workers."""

    def __init__(self, machine: Machine, folder: Path, up_pid: int, kill_every: float) -> None:
        self.machine, self.up_pid, self.kill_every = machine, up_pid, kill_every
        self.source = job(folder / "in.jsonl", JOB_LINES)
        self.submitted = self.kills = 0
        self.next_kill = time.monotonic() + kill_every
        self.memory: list[int] = []

    def run(self, requests: int, seconds: float) -> None:
        """Submits until enough was asked for or time is over, then waits for what is under way."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.submitted * JOB_LINES < requests:
            if self._open() < IN_FLIGHT:
                self.machine.json("submit", self.source, "--metadata", f"number={self.submitted}")
                self.submitted += 1
                self.memory.append(self._rss())
            self._kill_when_due()
            time.sleep(0.5)
        patience = time.monotonic() + max(300.0, seconds)
        while self._open():
            assert time.monotonic() < patience, "jobs do not end"
            self._kill_when_due()
            time.sleep(0.5)
        self.memory.append(self._rss())

    def _open(self) -> int:
        return sum(batch["status"] not in ("completed", "failed", "expired", "cancelled") for batch in self.machine.json("list"))

    def _kill_when_due(self) -> None:
        if time.monotonic() < self.next_kill:
            return
        self.next_kill = time.monotonic() + self.kill_every
        for pid in self.machine.workers()[:1]:
            os.kill(pid, signal.SIGKILL)
            self.kills += 1

    def _rss(self) -> int:
        """Of the supervisor, the API and the control process: what lives as long as the service."""
        total = 0
        for process in [psutil.Process(self.up_pid), *psutil.Process(self.up_pid).children()]:
            words = process.cmdline()
            if any(part in words for part in ("up", "api", "control")):
                total += process.memory_info().rss
        return total


def measure(folder: Path, minutes: float, requests: int, kill_every: float) -> dict[str, Any]:
    timing = {"LONGDRAFT_TIMING__LEASE": "20", "LONGDRAFT_TIMING__HEARTBEAT": "5", "LONGDRAFT_TIMING__SWEEP": "5"}
    machine = Machine(folder, LONGDRAFT_STANDIN__DELAY="0.2", LONGDRAFT_STANDIN__CAPACITY="256", LONGDRAFT_MAX_WORKERS="2", **timing)
    started = time.monotonic()
    with machine.up() as (process, _):
        soak = Soak(machine, folder, process.pid, kill_every)
        soak.run(requests, minutes * 60)
        ended = machine.json("list", "--limit", str(soak.submitted))
        bill = {finding["check"]: finding for finding in machine.json("doctor", check=False)}["bill"]
    counts = {name: sum(batch["request_counts"][name] for batch in ended) for name in ("total", "completed", "failed")}
    settled = soak.memory[min(3, len(soak.memory) - 1)]
    growth = soak.memory[-1] / settled
    return {
        "seconds": round(time.monotonic() - started, 1),
        "batches": soak.submitted,
        **counts,
        "workers_killed": soak.kills,
        "bill": bill["status"],
        "memory_mib": [round(settled / 2**20), round(soak.memory[-1] / 2**20)],
        "memory_growth": round(growth, 3),
        "pass": bill["status"] == "ok" and counts["completed"] == counts["total"] == soak.submitted * JOB_LINES and growth <= GROWTH,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--kill-every", type=float, default=15, metavar="SECONDS")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longdraft-soak-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # as root the servers run as another user
        report = measure(folder, options.minutes, options.requests, options.kill_every)
    sys.stdout.write((json.dumps(report) if options.json else "\n".join(f"{key:20} {value}" for key, value in report.items())) + "\n")
    return 0 if report["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
