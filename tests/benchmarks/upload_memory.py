"""How much memory an upload costs the server: `python -m tests.benchmarks.upload_memory [--megabytes 200] [--json]`.

The server runs in a process of its own on a real PostgreSQL and a directory store. After a small upload has warmed it up, one large
file is streamed in; the figure is the peak of its resident memory minus what it held before (Linux: VmHWM and VmRSS).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from service.adapters.memory import MemoryTaskQueue
from service.adapters.schema import upgrade
from service.bootstrap import Services, open_blobs, open_database
from service.config import Settings, load_settings
from service.embedded import embedded_servers
from service.usecases.keys import create_key
from tests.integration.api_server import serve

GOAL_BYTES = 100 * 1000 * 1000
BLOCK = b'{"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}\n' * 1000


@dataclass(frozen=True)
class Measurement:
    """Bytes of resident memory, and of the file."""

    file_bytes: int
    before: int
    peak: int
    seconds: float

    @property
    def extra(self) -> int:
        return self.peak - self.before


def measure(database_url: str, *, file_bytes: int) -> Measurement:
    """Uploads one file of this size to a fresh server process."""
    with tempfile.TemporaryDirectory() as folder, _server(database_url, folder, file_bytes) as (url, pid):
        settings = _settings(database_url, folder, file_bytes)
        with closing(open_database(settings)) as database:
            _, secret = create_key(database, "default", "benchmark", pepper=settings.key_pepper)
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {secret}"}, timeout=600) as client:
            _upload(client, 2_000_000)
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak to what is resident now
            before, begun = _status(pid, "VmRSS"), time.monotonic()
            _upload(client, file_bytes)
            return Measurement(file_bytes, before, _status(pid, "VmHWM"), time.monotonic() - begun)


def _upload(client: httpx.Client, size: int) -> None:
    head = b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    tail = b'\r\n--frontier\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--frontier--\r\n'

    def body() -> Iterator[bytes]:
        yield head
        left = size
        while left > 0:
            yield BLOCK[:left]
            left -= len(BLOCK)
        yield tail

    answer = client.post("/v1/files", content=body(), headers={"content-type": "multipart/form-data; boundary=frontier"})
    answer.raise_for_status()
    assert answer.json()["bytes"] == size


@contextmanager
def _server(database_url: str, folder: str, file_bytes: int) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "tests.benchmarks.upload_memory", "--serve", folder, "--bytes", str(file_bytes)]
    environ = os.environ | {"BENCHMARK_DATABASE_URL": database_url}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def _serve(folder: str, file_bytes: int) -> None:
    settings = _settings(os.environ["BENCHMARK_DATABASE_URL"], folder, file_bytes)
    with closing(open_database(settings)) as database:
        services = Services(settings, database, open_blobs(settings), MemoryTaskQueue())
        with serve(services) as server:
            sys.stdout.write(f"{httpx.URL(server.url).port}\n")
            sys.stdout.flush()
            time.sleep(3600)  # ended by SIGTERM


def _settings(database_url: str, folder: str, file_bytes: int) -> Settings:
    limits = {"max_file_bytes": max(file_bytes, 2_000_000)}
    return load_settings({}, data_dir=Path(folder), database_url=database_url, limits=limits)


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve, options.bytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)  # as root, the database runs as another user
        with embedded_servers(Path(folder)) as endpoints:
            upgrade(endpoints.migration_database_url)
            found = measure(endpoints.database_url, file_bytes=options.megabytes * 1_000_000)
    row = asdict(found) | {"extra_bytes": found.extra, "goal_bytes": GOAL_BYTES, "pass": found.extra <= GOAL_BYTES}
    text = f"{options.megabytes} MB uploaded in {found.seconds:.1f} s: {found.extra / 1e6:.1f} MB extra (goal: {GOAL_BYTES / 1e6:.0f})"
    sys.stdout.write((json.dumps(row) if options.json else text) + "\n")
    sys.exit(0 if row["pass"] else 1)


if __name__ == "__main__":
    main()
