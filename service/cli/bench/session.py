"""Runs the tasks of a benchmark one after the other, interleaved, and puts the figures together."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import orjson

from service.cli.bench.plan import BenchRequest, Task
from service.cli.output import Failure, console

if TYPE_CHECKING:
    from rich.progress import Progress

Answers = dict[str, list[Any]]
"""custom_id -> [text, generated tokens]."""


@dataclass(slots=True)
class Configuration:
    """A named way to run the job, and what its runs gave."""

    name: str
    task: Task
    speeds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0
    output_tokens: int = 0
    identical: list[int] = field(default_factory=list)

    def add(self, outcome: dict[str, Any], reference: Answers | None) -> None:
        answers = outcome["answers"]
        self.output_tokens = sum(tokens for _, tokens in answers.values())
        self.speeds.append(self.output_tokens / outcome["seconds"])
        self.peak_rss_bytes = max(self.peak_rss_bytes, outcome["peak_rss_bytes"])
        if reference is not None:
            self.identical.append(sum(answers.get(custom_id) == answer for custom_id, answer in reference.items()))

    def row(self, reference: Answers | None) -> dict[str, Any]:
        speeds = {"median": median(self.speeds), "min": min(self.speeds), "max": max(self.speeds)}
        return {
            "name": self.name,
            "tokens_per_second": {name: round(value, 2) for name, value in speeds.items()},
            "output_tokens": self.output_tokens,
            "peak_rss_bytes": self.peak_rss_bytes,
            "identical_to_reference": [min(self.identical), len(reference)] if reference is not None else None,
        }


def run_bench(request: BenchRequest, *, cache_dir: Path, quiet: bool) -> dict[str, Any]:
    """The whole benchmark: reference (cached), sweep of the comparison (cached), then the interleaved repeats.

    Raises Failure where a run fails, with its reason.
    """
    store = cache_dir / "bench"
    with _display(quiet) as display:
        session = _Session(request, store, display)
        reference = session.reference() if request.check else None
        configurations = session.configurations()
        device = "cpu"
        for repeat in range(request.repeats):
            for configuration in configurations:
                outcome = session.run(configuration.task, f"{configuration.name} ({repeat + 1}/{request.repeats})")
                configuration.add(outcome, reference)
                device = outcome["device"]
    return {"job": request.job, "device": describe(device), "runs": [configuration.row(reference) for configuration in configurations]}


@dataclass(slots=True)
class _Session:
    request: BenchRequest
    store: Path
    display: Progress

    def reference(self) -> Answers:
        """Answers of transformers' `generate`, one line at a time, float32: what every configuration should say."""
        task = self.request.task("transformers", dtype="float32", batch_size=1)
        path = self.store / f"reference-{self.request.digest(version('transformers'))}.json"
        kept: Answers | None = _read(path)
        if kept is None:
            kept = self.run(task, "reference, one by one (kept for the next time)")["answers"]
            _write(path, kept)
        return kept

    def configurations(self) -> list[Configuration]:
        found = []
        for drafter in self.request.drafters:
            name = f"longdraft, drafter {drafter}"
            if self.request.max_sequences is not None:
                name += f", {self.request.max_sequences} sequences"
            found.append(Configuration(name, self.request.task("longdraft", drafter=drafter, max_sequences=self.request.max_sequences)))
        for peer in self.request.peers:
            size = self._best_batch_size(peer)
            found.append(Configuration(f"{peer}, static batches of {size}", self.request.task(peer, batch_size=size)))
        return found

    def _best_batch_size(self, peer: str) -> int:
        """Tries each size once on the whole job; what was found is kept for this job, model, format and machine."""
        sizes = sorted({min(size, len(self.request.lines)) for size in self.request.batch_sizes})
        if len(sizes) == 1:
            return sizes[0]
        path = self.store / f"sweep-{self.request.digest(peer, version(peer), self.request.dtype, platform.node(), os.cpu_count())}.json"
        speeds: dict[str, float] = _read(path) or {}
        for size in sizes:
            if str(size) not in speeds:
                outcome = self.run(self.request.task(peer, batch_size=size), f"{peer}, trying batches of {size}")
                speeds[str(size)] = sum(tokens for _, tokens in outcome["answers"].values()) / outcome["seconds"]
                _write(path, speeds)
        return max(sizes, key=lambda size: speeds[str(size)])

    def run(self, task: Task, label: str) -> dict[str, Any]:
        """One run in a process of its own."""
        bar = self.display.add_task(label, total=len(task.lines))
        process = subprocess.Popen(  # our own module
            [sys.executable, "-m", "service.cli.bench.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            outcome = self._follow(process, task, bar)
        finally:
            process.kill()
            process.wait()
        self.display.remove_task(bar)
        return outcome

    def _follow(self, process: subprocess.Popen[bytes], task: Task, bar: Any) -> dict[str, Any]:
        import threading

        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        noise: list[bytes] = []
        drain = threading.Thread(target=lambda stream: noise.extend(stream), args=(process.stderr,), daemon=True)
        drain.start()
        process.stdin.write(task.encode())
        process.stdin.close()
        for line in process.stdout:
            event: dict[str, Any] = orjson.loads(line)
            if "error" in event:
                raise Failure(event["error"])
            if "seconds" in event:
                return event
            self.display.update(bar, completed=event["done"])
        drain.join(5)
        last = noise[-1].decode("utf-8", "replace").strip() if noise else "no message"
        raise Failure(f"The run of {task.kind} ended with exit code {process.wait()}: {last}")


@contextmanager
def _display(quiet: bool) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), disable=quiet, transient=True) as progress:
        yield progress


def describe(device: str) -> str:
    """`cpu` as people know it: the processor's name and the cores this process may use."""
    if device != "cpu":
        return device
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux on x86; the machine's type is enough
    return f"cpu: {name}, {len(os.sched_getaffinity(0))} cores"


def _read(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(orjson.dumps(value))
    partial.replace(path)
