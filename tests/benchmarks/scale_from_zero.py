"""0 -> 2 -> 0 workers on one machine with the real model: `python -m tests.benchmarks.scale_from_zero [--json]`.

Three jobs on one `longdraft up` with `max_workers = 2`. The first starts from no worker and no profile of the machine, the second from no
worker and a warm profile: from submission to the first result, split. In the third a worker is ended by SIGTERM in the middle: how
long its work waits for another one, and that nothing is lost. Every worker's wall time is held against its meters.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from service.cli.models import pull
from service.config import load_settings
from service.running import RunningServer
from tests.integration.test_up import Machine, wait_for

LINES, TOKENS = 320, 16
"""Five groups: two workers share them, and one has room for a group of the other's."""
GOAL_PICKUP, GOAL_UNACCOUNTED = 5.0, 0.005
IDLE_SECONDS = 4


class Service:
    """A running `up`, its database, and how many of its workers live."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder = machine, folder
        running = RunningServer.read(folder / "data")
        assert running is not None
        self.connection = psycopg.connect(running.database_url, autocommit=True)

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(query.encode(), values).fetchall()

    def submit(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(_line(name, number)) + "\n" for number in range(LINES)))
        return dict(self.machine.json("submit", path))

    def status(self, batch_id: str) -> str:
        return str(self.ask("SELECT status FROM batches WHERE id = %s", batch_id)[0][0])

    def holders(self) -> dict[str, list[int]]:
        """Worker -> the groups it has on lease."""
        query = "SELECT worker_id, array_agg(id) FROM groups WHERE worker_id IS NOT NULL AND closed_at IS NULL GROUP BY worker_id"
        return dict(self.ask(query))  # type: ignore[arg-type]

    def run(self, batch_id: str, during: Callable[[], Any] = lambda: None) -> int:
        """Until the batch has ended; returns the most workers that lived at once."""
        peak = 0
        deadline = time.monotonic() + 900
        while self.status(batch_id) not in ("completed", "failed", "expired", "cancelled"):
            assert time.monotonic() < deadline, f"{batch_id} is still {self.status(batch_id)}"
            peak = max(peak, len(self.machine.workers()))
            during()
            time.sleep(0.05)
        return peak

    def until_empty(self) -> float:
        started = time.monotonic()
        wait_for(lambda: not self.machine.workers(), seconds=60)
        return time.monotonic() - started


def _line(name: str, number: int) -> dict[str, Any]:
    content = f"Job {name}: write one sentence about the number {number}, its neighbours and where one meets it."
    body = {"model": "smollm2-135m", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0}
    return {"custom_id": f"{name}-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


class Eviction:
    """Ends one of two working workers by SIGTERM, once, and watches what becomes of its groups."""

    def __init__(self, service: Service, batch_id: str) -> None:
        self.service, self.batch_id = service, batch_id
        self.asked_at = 0.0
        self.groups: set[int] = set()
        self.victim = ""
        self.released: float | None = None
        self.first_pickup: float | None = None
        self.all_picked_up: float | None = None

    def __call__(self) -> None:
        now = time.monotonic()
        if not self.groups:
            holders = self.service.holders()
            done = self.service.ask("SELECT completed FROM batches WHERE id = %s", self.batch_id)[0][0]
            if len(holders) == 2 and done > 0:
                self._evict(holders)
            return
        rows = self.service.ask("SELECT id, worker_id, closed_at FROM groups WHERE id = ANY(%s)", list(self.groups))
        mine = [row for row in rows if row[1] == self.victim and row[2] is None]
        if self.released is None and not mine:
            self.released = now - self.asked_at
        taken = [row for row in rows if row[2] is not None or row[1] not in (None, self.victim)]
        if taken and self.first_pickup is None:
            self.first_pickup = now - self.asked_at
        if len(taken) == len(rows) and self.all_picked_up is None:
            self.all_picked_up = now - self.asked_at

    def _evict(self, holders: dict[str, list[int]]) -> None:
        self.victim = max(holders, key=lambda worker: len(holders[worker]))
        self.groups = set(holders[self.victim])
        ((pid,),) = self.service.ask("SELECT pid FROM workers WHERE id = %s", self.victim)
        os.kill(pid, signal.SIGTERM)
        self.asked_at = time.monotonic()

    def report(self) -> dict[str, Any]:
        seconds = {"released": self.released, "first_group_picked_up": self.first_pickup, "all_picked_up": self.all_picked_up}
        return {"groups": len(self.groups), **{name: round(value, 2) if value is not None else None for name, value in seconds.items()}}


def measure(folder: Path) -> dict[str, Any]:
    settings = load_settings()
    (folder / "cache").mkdir()
    (folder / "cache" / "models").symlink_to(pull(settings, None).parent)  # the model is here; the profile is not
    machine = Machine(
        folder,
        LONGDRAFT_RUNNER="engine",
        LONGDRAFT_CACHE_DIR=str(folder / "cache"),
        LONGDRAFT_MAX_WORKERS="2",
        LONGDRAFT_TIMING__WORKER_IDLE=str(IDLE_SECONDS),
        LONGDRAFT_ENGINE__THREADS=str(max(1, len(os.sched_getaffinity(0)) // 2)),
    )
    report: dict[str, Any] = {"lines": LINES, "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    with machine.up():
        service = Service(machine, folder)
        for name in ("cold", "warm"):
            assert not machine.workers()
            batch = service.submit(name)
            peak = service.run(batch["id"])
            report[name] = {"workers": [0, peak, 0], "idle_until_zero": round(service.until_empty(), 2)}
            report[name]["starts"] = [start for start in _workers(machine)["starts"] if start["batch"] == batch["id"]]
        batch = service.submit("evicted")
        eviction = Eviction(service, batch["id"])
        service.run(batch["id"], eviction)
        counts = service.ask("SELECT total, completed, failed FROM batches WHERE id = %s", batch["id"])[0]
        report["sigterm"] = {**eviction.report(), "total": counts[0], "completed": counts[1], "failed": counts[2]}
        service.until_empty()
        rows = _workers(machine)["rows"]
        service.connection.close()
    report["workers"] = [{name: row[name] for name in row if name not in ("cost", "device")} for row in rows]
    report["load_after"] = os.getloadavg()[0]
    report["pass"] = _passes(report)
    return report


def _workers(machine: Machine) -> dict[str, Any]:
    return dict(machine.json("cost", "--workers"))


def _passes(report: dict[str, Any]) -> bool:
    pickup, sigterm = report["sigterm"]["first_group_picked_up"], report["sigterm"]
    return (
        report["cold"]["workers"] == [0, 2, 0]
        and report["warm"]["workers"] == [0, 2, 0]
        and sum(not start["profile_reused"] for start in report["cold"]["starts"]) == 1  # the other worker waited for it
        and all(start["profile_reused"] for start in report["warm"]["starts"])
        and (sigterm["completed"], sigterm["failed"]) == (LINES, 0)
        and pickup is not None
        and pickup <= GOAL_PICKUP
        and all(abs(row["unaccounted"]) <= GOAL_UNACCOUNTED for row in report["workers"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longdraft-scale-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # as root the servers run as another user
        report = measure(folder)
    sys.stdout.write(json.dumps(report, indent=None if options.json else 2) + "\n")
    return 0 if report["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
