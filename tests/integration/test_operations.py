"""What operators see: health, readiness and metrics of every process over HTTP, logs with ids and without prompts, workers by GPU."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.adapters.blobs_local import LocalBlobStore
from service.adapters.memory import MemoryTaskQueue
from service.adapters.standin import StandinRunner
from service.bootstrap import Services
from service.config import load_settings
from service.control import Control
from service.metrics import WorkerMetrics
from service.ops import Readiness, ops_server
from service.usecases.readiness import CLAIM_WITHIN, ClaimedLately
from tests.integration.intake import LEASE
from tests.integration.jobs import Jobs, lines, settings_for
from tests.integration.test_up import COMMAND, LINES, Machine, job, wait_for

PROMPT = "the quick brown fox and its secrets"


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in range(21_000, 30_000, count):
        with_sockets = [socket.socket() for _ in range(count)]
        try:
            for number, tried in enumerate(with_sockets):
                tried.bind(("127.0.0.1", first + number))
        except OSError:
            continue
        else:
            return first
        finally:
            for tried in with_sockets:
                tried.close()
    raise AssertionError("no free ports")


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def samples(text: str) -> dict[str, float]:
    """`name{label="value"}` -> value; a text that Prometheus would refuse fails here."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


# --- a whole service ----------------------------------------------------------------------------------------------------------


def test_a_job_as_its_operator_sees_it(folder: Path) -> None:
    """One job on `up` with every log line on: all three processes answer, the counters add up, and no log holds a word of a prompt."""
    first = free_ports(3)
    machine = Machine(
        folder,
        LONGDRAFT_OPS_PORT=str(first),
        LONGDRAFT_LOG_LEVEL="DEBUG",
        LONGDRAFT_LOG_FORMAT="json",
        LONGDRAFT_STANDIN__DELAY="0.3",
        LONGDRAFT_STANDIN__CAPACITY="32",
        LONGDRAFT_TIMING__WORKER_IDLE="20",
    )
    source = job(folder / "in.jsonl", bad={3})
    source.write_text(source.read_text().replace("say ", f"{PROMPT} "))
    with machine.up() as (_, server):
        batch = machine.json("submit", source)
        api, control, worker = first, first + 1, first + 2
        assert wait_for(lambda: get(worker, "/readyz")[0] == 200)
        for port in (api, control, worker):
            assert get(port, "/healthz")[0] == 200
            wait_for(lambda port=port: get(port, "/readyz")[0] == 200)
            assert get(port, "/elsewhere")[0] == 404
        assert get(int(server["url"].rpartition(":")[2]), "/metrics")[0] == 404, "metrics are not for users"
        working = wait_for(lambda: (found := samples(get(control, "/metrics")[1])).get("longdraft_live_workers") and found)
        assert working["longdraft_database_up"] == 1
        open_groups = sum(value for name, value in working.items() if name.startswith("longdraft_groups{"))
        assert 1 <= open_groups <= LINES
        machine.run("watch", batch["id"], check=False)
        done = samples(get(worker, "/metrics")[1])
        assert done["longdraft_lines_total{outcome=succeeded}"] == LINES - 1
        assert done["longdraft_lines_total{outcome=rejected}"] == 1
        assert done["longdraft_tokens_total{kind=generated}"] > 0
        assert {f"longdraft_device_seconds_total{{kind={kind}}}" for kind in ("busy", "idle", "load", "profile")} <= done.keys()
        requests = samples(get(api, "/metrics")[1])
        assert requests["longdraft_api_request_seconds_count{method=POST,route=/v1/batches,status=200}"] == 1
        assert not [name for name in requests if batch["id"] in name], "an id as a label is a new series for every batch"
    logs = {path.name: path.read_text() for path in (folder / "data" / "logs").iterdir()}
    assert {"api.log", "control.log", "worker.log"} <= logs.keys()
    for name, text in logs.items():
        assert PROMPT not in text, name
        assert "fox" not in text, name
    events = [json.loads(line) for line in logs["worker.log"].splitlines() if line.startswith("{")]
    assert any(event["event"] == "committed" and event["batch_ids"] == [batch["id"]] for event in events)
    assert any(event["event"] == "claimed" and event["batch_ids"] == [batch["id"]] for event in events)


def test_one_worker_a_gpu_each_pinned_and_all_end_together(database_url: str, broker_url: str, tmp_path: Path) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    script.chmod(0o755)
    machine = Machine(
        tmp_path,
        LONGDRAFT_DATABASE_URL=database_url,
        LONGDRAFT_BROKER_URL=broker_url,
        LONGDRAFT_BLOB_URL=f"file://{tmp_path}/blobs",
        PATH=f"{tmp_path}:/usr/bin:/bin",
    )
    machine.environment.pop("CUDA_VISIBLE_DEVICES", None)
    process = subprocess.Popen([*COMMAND, "worker", "--gpus", "all"], env=machine.environment, stderr=subprocess.PIPE, text=True)
    try:
        children = wait_for(lambda: (found := _children(process.pid)) and len(found) == 2 and all(map(_pin, found)) and found)
        assert sorted(map(_pin, children)) == ["0", "1"]
        from service.adapters.unit_of_work import PostgresDatabase

        database = PostgresDatabase(database_url)

        def live() -> int:
            with database.begin() as uow:
                return len(uow.workers.live(timedelta(minutes=1)))

        wait_for(lambda: live() == 2)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert live() == 0, "each left in good order"
    database.close()
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _pin(pid: int) -> str | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry.partition(b"=")[2].decode() for entry in environment if entry.startswith(b"CUDA_VISIBLE_DEVICES=")), None)


# --- the parts ----------------------------------------------------------------------------------------------------------------


def test_readiness_says_why_and_a_broken_part_is_not_ready(tmp_path: Path) -> None:
    from service.errors import ConfigError, Unavailable

    settings = load_settings({}, data_dir=tmp_path, ops_port=free_ports(1))
    port = settings.ops_port
    assert port is not None
    answers: list[Any] = [Readiness(True, "fine"), Readiness(False, "late"), Unavailable("no database")]

    def ready() -> Readiness:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with ops_server(settings, metrics=lambda: b"a 1\n", ready=ready):
        assert get(port, "/readyz") == (200, '{"ready": true, "reason": "fine"}')
        assert get(port, "/readyz") == (503, '{"ready": false, "reason": "late"}')
        assert get(port, "/readyz?verbose") == (503, '{"ready": false, "reason": "no database"}')
        assert get(port, "/metrics") == (200, "a 1\n")
        with pytest.raises(ConfigError, match=str(port)), ops_server(settings, metrics=bytes, ready=ready):
            pass
    assert get(port, "/healthz") == (0, "")


class Idle:
    """A worker that holds `held` groups and claimed at `last_claim`."""

    def __init__(self) -> None:
        self.held, self.last_claim = 0, 0.0


def test_a_worker_is_ready_while_it_claims_what_is_due(database: Any, tmp_path: Path) -> None:
    jobs = Jobs(database, LocalBlobStore(tmp_path / "blobs"), settings=settings_for(tmp_path))
    worker, stop, now = Idle(), threading.Event(), [1000.0]
    lately = ClaimedLately(database, worker, stop, clock=lambda: now[0])
    assert lately() == (True, "nothing is due")
    now[0] += 10 * CLAIM_WITHIN
    jobs.run(lines(3))
    assert lately()[0], "due since this moment"
    now[0] += CLAIM_WITHIN + 1
    assert lately() == (False, "1 groups are due and none was claimed for 61 s")
    worker.held = 1
    assert lately()[0]
    worker.held = 0
    assert lately()[0], "due anew"
    worker.last_claim = now[0] = now[0] + CLAIM_WITHIN + 1
    assert lately()[0]
    stop.set()
    assert lately() == (False, "stopping")


def test_the_backlog_in_each_state_of_a_job(database: Any, tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    services = Services(settings, database, LocalBlobStore(tmp_path / "blobs"), MemoryTaskQueue())
    jobs = Jobs(database, services.blobs, settings=settings, group_lines=2)
    control = Control(services)
    batch = jobs.submit(lines(6))
    found = samples(control.metrics.text().decode())
    assert found["longdraft_batches{status=validating}"] == 1
    assert found["longdraft_outbox_items{kind=validate}"] == 1
    jobs.validate(jobs.claim(batch))
    assert samples(control.metrics.text().decode())["longdraft_groups{model=smollm2-135m,state=due}"] == 3
    with database.begin() as uow:
        (lease, *_) = uow.groups.claim("w", model=None, lease=LEASE, max_lines=2)
    found = samples(control.metrics.text().decode())
    assert (found["longdraft_groups{model=smollm2-135m,state=due}"], found["longdraft_groups{model=smollm2-135m,state=leased}"]) == (2, 1)
    with database.begin() as uow:
        uow.groups.release({lease.group_id: lease.token}, delay=LEASE)
    assert samples(control.metrics.text().decode())["longdraft_groups{model=smollm2-135m,state=waiting}"] == 1
    assert control.ready().ready is False, "it has not run a round yet"


def test_metrics_survive_a_database_that_is_away(tmp_path: Path) -> None:
    from service.adapters.unit_of_work import PostgresDatabase

    settings = load_settings({}, data_dir=tmp_path)
    database = PostgresDatabase(f"postgresql://nobody@/nothing?host={tmp_path}")
    control = Control(Services(settings, database, LocalBlobStore(tmp_path / "blobs"), MemoryTaskQueue()))
    assert samples(control.metrics.text().decode())["longdraft_database_up"] == 0


def test_a_workers_device_seconds_are_its_wall_time(tmp_path: Path) -> None:
    metrics = WorkerMetrics(StandinRunner(settings_for(tmp_path)), Idle())
    found = samples(metrics.text().decode())
    assert found["longdraft_held_groups"] == 0
    assert found["longdraft_device_seconds_total{kind=busy}"] == 0
    assert found["longdraft_device_seconds_total{kind=idle}"] > 0
