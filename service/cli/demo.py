"""`make demo`: from an empty folder to answers and a bill, through the stock OpenAI SDK, and nothing left running."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from service.cli import bill
from service.cli.batch_cmds import endpoint_of
from service.cli.client import Server
from service.cli.output import Failure, console, note
from service.cli.progress import ENDED, figures, line_progress
from service.config import Settings, load_settings
from service.running import RunningServer
from service.supervisor import running_service

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

EXAMPLES = Path(__file__).parents[2] / "infra" / "examples"
RESULTS = Path("build") / "demo"
POLL_SECONDS = 0.5
SHOWN_CHARACTERS = 220


def run_demo(job: Path | None, *, keep: bool, stop: threading.Event) -> None:
    """Raises Failure where a line got no answer; everything is stopped first either way."""
    started = time.monotonic()
    RESULTS.mkdir(parents=True, exist_ok=True)
    job = job or _example_job(RESULTS / "job.jsonl")
    data_dir = Path(tempfile.mkdtemp(prefix="longdraft-demo-"))
    data_dir.chmod(0o711)  # as root PostgreSQL runs as another user, who must be able to walk in
    try:
        note(f"Starting PostgreSQL, Valkey, API and control process from zero in {data_dir}")
        service = running_service(_fresh(data_dir), stop=stop, say=lambda text: note(f"  {text}"))
        with _fetching_model() as wait_for_model, service as running:
            note(f"Up after {time.monotonic() - started:.1f} s: {running.url}/v1")
            wait_for_model()
            _use(running, job, stop)
    finally:
        if keep:
            note(f"Kept: {data_dir}")
        else:
            shutil.rmtree(data_dir, ignore_errors=True)
    note(f"All stopped. {time.monotonic() - started:.1f} s in all. Start it for good with: longdraft up")


def _use(running: RunningServer, job: Path, stop: threading.Event) -> None:
    """What a user does: upload, create, wait, download, look at the bill."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{running.url}/v1", api_key=running.api_key, _strict_response_validation=True)
    with job.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="batch")
    endpoint: Any = endpoint_of(job)
    batch = client.batches.create(input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h", metadata={"job": "demo"})
    note(f"Submitted {job} ({uploaded.bytes} bytes) as {batch.id}\n")
    batch = _watch(client, batch.id, stop)
    paths = _download(client, batch)
    _show_answers(job, paths)
    with Server(running.url, running.api_key) as server:
        print()
        bill.print_report(server.get(f"/batches/{batch.id}/cost"))
    print("\nFiles")
    for path in (job, *paths):
        print(f"  {path}")
    counts = batch.request_counts
    if batch.status != "completed" or counts is None or counts.failed:
        raise Failure(f"The demo's batch ended {batch.status} with {counts.failed if counts else 'unknown'} failed lines; see {RESULTS}.")


def _watch(client: OpenAI, batch_id: str, stop: threading.Event) -> Batch:
    with line_progress() as progress:
        task = progress.add_task("validating", total=None, figures="")
        while True:
            batch = client.batches.retrieve(batch_id)
            counts = batch.request_counts
            assert counts is not None
            done = counts.completed + counts.failed
            progress.update(task, description=batch.status, total=counts.total or None, completed=done, figures=figures(batch.model_dump()))
            if batch.status in ENDED:
                return batch
            if stop.wait(POLL_SECONDS):
                raise Failure("Interrupted before the batch had ended.")


def _download(client: OpenAI, batch: Batch) -> list[Path]:
    paths = []
    for file_id, name in ((batch.output_file_id, "answers.jsonl"), (batch.error_file_id, "answers.errors.jsonl")):
        path = RESULTS / name
        path.unlink(missing_ok=True)
        if file_id:
            client.files.content(file_id).write_to_file(path)
            paths.append(path)
    return paths


def _show_answers(job: Path, paths: Sequence[Path]) -> None:
    """One answer of every kind of line, with the end of its prompt."""
    from rich.text import Text

    prompts = {line["custom_id"]: line["body"] for line in _lines(job)}
    out = console()
    seen: set[str] = set()
    for line in (line for path in paths[:1] for line in _lines(path)):
        kind = line["custom_id"].partition("-")[0]
        if kind in seen:
            continue
        seen.add(kind)
        asked = prompts[line["custom_id"]]["messages"][-1]["content"]
        answer = line["response"]["body"]["choices"][0]["message"]["content"]
        out.print(Text.assemble("\n", (line["custom_id"], "bold"), "  ", (_short(asked, last=True), "dim")))
        out.print(Text.assemble("  -> ", _short(answer)))


def _short(text: str, *, last: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"... {text[-SHOWN_CHARACTERS // 2 :]}" if last else f"{text[:SHOWN_CHARACTERS]} ..."


def _example_job(path: Path) -> Path:
    """All example files in one job."""
    parts = sorted(EXAMPLES.glob("*.jsonl"))
    if not parts:
        raise Failure(f"The example jobs are part of the source tree ({EXAMPLES}) and not here; name a job with --job.")
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@contextmanager
def _fetching_model() -> Iterator[Callable[[], None]]:
    """Fetches the default model in a process of its own, so that this one never loads torch; the value waits for it."""
    process = subprocess.Popen([sys.executable, "-m", "service.cli.main", "models", "pull"], stdout=subprocess.DEVNULL)

    def wait() -> None:
        if process.wait():
            raise Failure("The default model could not be fetched; the reason stands above.")

    try:
        yield wait
    finally:
        process.kill()
        process.wait()


def _fresh(data_dir: Path) -> Settings:
    """The user's settings, but with nothing that is running elsewhere: every part is started here."""
    own = {"database_url": None, "migration_database_url": None, "broker_url": None, "blob_url": None, "url": None, "api_key": None}
    return load_settings().model_copy(update={**own, "data_dir": data_dir, "host": "127.0.0.1", "port": 0})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from map(orjson.loads, file)
