"""`longdraft doctor`: looks at every part and says what it found, with what to do where something is wrong."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from service.errors import LongdraftError

if TYPE_CHECKING:
    from service.bootstrap import Services
    from service.config import Settings

Status = Literal["ok", "warning", "failed", "skipped"]
_MARKS: dict[Status, str] = {"ok": "✓", "warning": "!", "failed": "✗", "skipped": "-"}
_LIVE = timedelta(minutes=1)
_TODAY = timedelta(days=1)

# Asked in a process of its own: loading torch takes seconds, and a broken one may take its process down.
_TORCH_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "gpus": gpus, "threads": torch.get_num_threads()}))
"""


_FIT_PROBE = """
import sys
from engine.checkpoints.loader import fit
print(fit(*sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    status: Status
    detail: str

    @property
    def mark(self) -> str:
        return _MARKS[self.status]


def examine(settings: Settings) -> list[Finding]:
    """All findings. Starts the embedded servers for the time of the look where none are configured or running; changes nothing else."""
    findings = [_versions(), _engine_packages(), _kernels_clash(), *_models(settings)]
    findings.extend(_deployment())
    return findings


def _versions() -> Finding:
    detail = f"Longdraft {version('longdraft')}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("versions", "ok", detail)


def _engine_packages() -> Finding:
    missing = [name for name in ("torch", "transformers", "safetensors", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        detail = f"{', '.join(missing)} not installed: this machine can serve the API and the control process, but no worker"
        return Finding("engine", "skipped", detail)
    done = subprocess.run([sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        return Finding(
            "engine", "failed", f"torch does not load: {done.stderr.strip().splitlines()[-1:] or done.returncode}. Install it again."
        )
    found = json.loads(done.stdout.splitlines()[-1])
    device = ", ".join(found["gpus"]) or f"CPU, {found['threads']} threads"
    return Finding("engine", "ok", f"torch {found['version']}, transformers {version('transformers')}, device: {device}")


def _kernels_clash() -> Finding:
    from kernels.clash import clash_message, installed_hf_kernels

    other = installed_hf_kernels()
    if other is None:
        return Finding("kernels", "ok", "no other package uses the import name `kernels`")
    return Finding("kernels", "failed", clash_message(other))


def _models(settings: Settings) -> Iterator[Finding]:
    from service.cli.models import catalogue

    for row in catalogue(settings):
        if row["id"] == settings.default_model and row["state"] == "not fetched yet":
            detail = f"the default model {row['id']} is not fetched yet; the first job fetches it, or run: longdraft models pull"
            yield Finding("models", "warning", detail)
        elif row["id"] == settings.default_model:
            yield _fits(row["id"], row["state"], settings)


def _fits(model: str, folder: str, settings: Settings) -> Finding:
    """Whether the default model fits this machine, where it is here and torch can say so."""
    entry = settings.models[model]
    dtype = entry.dtype or settings.engine.dtype
    if not Path(folder).is_dir() or importlib.util.find_spec("torch") is None:
        return Finding("models", "ok", f"{model}: {folder}")
    command = [sys.executable, "-c", _FIT_PROBE, folder, dtype, settings.engine.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return Finding("models", "failed", f"{model} cannot run here: {reason[0].partition(': ')[2] or reason[0]}")
    return Finding("models", "ok", f"{model}: {folder}; {done.stdout.strip()}")


def _deployment() -> Iterator[Finding]:
    """Everything that needs the running parts; one failed part does not hide the others."""
    from service.cli.connect import open_deployment

    try:
        with open_deployment() as services:
            checks: dict[str, Callable[[Services], Finding]] = {
                "database": _database,
                "schema": _schema,
                "broker": _broker,
                "objects": _objects,
                "workers": _workers,
                "loads": _loads,
                "bill": _bill,
            }
            for name, check in checks.items():
                try:
                    yield check(services)
                except LongdraftError as error:
                    yield Finding(name, "failed", error.message)
    except LongdraftError as error:
        yield Finding("services", "failed", error.message)


def _database(services: Services) -> Finding:
    services.database.ping()
    with services.database.begin() as uow:
        projects = len(uow.accounts.projects())
        open_items = uow.outbox.open_items()
    return Finding("database", "ok", f"answers; {projects} project(s), {open_items} open work item(s)")


def _schema(services: Services) -> Finding:
    from service.adapters.schema import state

    url = services.settings.migration_database_url or services.settings.database_url
    assert url is not None
    current, newest = state(url)
    if current != newest:
        return Finding(
            "schema", "failed", f"the schema is at {current or 'nothing'}, this version needs {newest}. Run: longdraft db upgrade"
        )
    return Finding("schema", "ok", f"at {newest}, the newest revision")


def _broker(services: Services) -> Finding:
    services.queue.ping()
    return Finding("broker", "ok", "answers")


def _objects(services: Services) -> Finding:
    found = services.blobs.probe()
    return Finding("objects", "ok", "; ".join(f"{name}: {value}" for name, value in found.items()))


def _workers(services: Services) -> Finding:
    with services.database.begin() as uow:
        live = uow.workers.live(_LIVE)
        due = sum(uow.watch.due().values())
    detail = f"{len(live)} live, {due} group(s) due"
    if due and not live:
        return Finding("workers", "warning", f"{detail}: nobody takes them. Is `longdraft up` or `longdraft worker` running?")
    return Finding("workers", "ok", detail)


def _loads(services: Services) -> Finding:
    with services.database.begin() as uow:
        rows = uow.loads.between(uow.now - _TODAY, uow.now + _LIVE)
    newest = {row.load.model: row for row in rows}
    refused = {model: row for model, row in newest.items() if row.load.error is not None}
    if not refused:
        return Finding("loads", "ok", f"{len(rows)} load(s) of a model in the last day, none refused at last")
    texts = [f"{model} on {row.device}: {row.load.error}" for model, row in sorted(refused.items())]
    return Finding("loads", "failed", "; ".join(texts))


def _bill(services: Services) -> Finding:
    from service.usecases.oracles import check

    violations = check(services.database, services.blobs, None)
    if violations:
        first = "; ".join(str(violation) for violation in violations[:3])
        return Finding("bill", "failed", f"{len(violations)} violation(s): {first}")
    return Finding("bill", "ok", "every delivered line is charged exactly once, every transaction sums to zero, files and counts agree")
