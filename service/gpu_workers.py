"""`longdraft worker --gpus all`: one worker process a GPU, each seeing its own and no other."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from service.bootstrap import open_database
from service.children import Child, describe_exit, stop_all
from service.config import Settings
from service.errors import ConfigError
from service.worker_pool import release_worker

POLL_SECONDS = 0.5
PINNED = "CUDA_VISIBLE_DEVICES"

log = structlog.get_logger(__name__)


def visible_gpus() -> list[str]:
    """The GPUs that a process started now would see, as CUDA_VISIBLE_DEVICES names them: without loading torch, which would occupy one."""
    named = os.environ.get(PINNED)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() and name.strip() != "-1"]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - found on the operator's PATH
    return [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()] if done.returncode == 0 else []


def choose_gpus(asked: str, visible: Sequence[str]) -> list[str]:
    """`all`, or numbers and names with commas. Raises ConfigError for one that is not there."""
    if asked == "all":
        return list(visible)
    chosen = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in visible]
    if unknown or not chosen:
        there = ", ".join(visible) or "none"
        raise ConfigError(f"--gpus is {asked!r}; visible here: {there}. Name some of them, or `all`.", param="gpus")
    return chosen


def pinned(environment: Mapping[str, str], gpu: str) -> dict[str, str]:
    """The environment of a process that may see this GPU only."""
    return {**environment, PINNED: gpu}


def run_gpu_workers(settings: Settings, gpus: Sequence[str], stop: threading.Event, *, exit_when_idle: bool = False) -> None:
    """Keeps one worker a GPU running until `stop` is set; one that died gives its leases back at once and starts again after a pause.

    With `exit_when_idle` it returns when all have left.
    """
    database = open_database(settings)
    children = [_child(settings, gpu, number, exit_when_idle) for number, gpu in enumerate(gpus)]
    try:
        for child in children:
            child.start()
        while children and not stop.wait(POLL_SECONDS):
            children = [child for child in children if not _look_after(child, lambda name: release_worker(database, name, _say))]
    finally:
        stop_all(children, settings.timing.shutdown_grace)
        database.close()


def _look_after(child: Child, release: Callable[[str], None]) -> bool:
    """Whether it left in good order. One that died is started again."""
    status, now = child.ended(), time.monotonic()
    if status == 0:
        return True
    if status is not None:
        release(child.name)
        pause = child.backoff.failed(now, now - child.started)
        log.warning("worker_died", worker=child.name, status=describe_exit(status), again_in=pause)
    elif child.process is None and now >= child.backoff.not_before:
        child.start()
    return False


def _child(settings: Settings, gpu: str, number: int, exit_when_idle: bool) -> Child:
    name = f"worker-{secrets.token_hex(4)}-gpu{number}"
    command = [sys.executable, "-m", "service.cli.main", "worker", "--id", name, "--parent", str(os.getpid())]
    environment = pinned(os.environ, gpu)
    if settings.ops_port is not None:
        environment["LONGDRAFT_OPS_PORT"] = str(settings.ops_port + number)
    return Child(name, [*command, "--exit-when-idle"] if exit_when_idle else command, environment, None)


def _say(text: str) -> None:
    log.warning("lease_release", text=text)
