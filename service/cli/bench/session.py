"""Runs the tasks of a benchmark one after the other, interleaved, and puts the figures together."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import orjson

from service.cli.bench import bound, environments, statistics
from service.cli.bench.peers import PEERS, Family
from service.cli.bench.plan import BenchRequest, Task
from service.cli.bench.prompts import Prompts, wire_job
from service.cli.output import Failure, console
from service.cli.progress import count_columns

if TYPE_CHECKING:
    from rich.progress import Progress

_IN_OUR_ENVIRONMENT = ("longdraft", "transformers", "bound")
_REFERENCE_LINES = 16
"""A process of the reference: what is lost if it is interrupted."""

STOP_TIMES = 2.0
"""Of the fastest peer's time: another one's trial is stopped then."""
_NEAR = 0.85
"""Share of the fastest peer's speed from which on a peer is repeated."""

Answers = dict[str, list[Any]]
"""custom_id -> [text, generated tokens]."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run at one batch size. stopped: at `seconds`, before it was done; it has no speed then."""

    seconds: float
    output_tokens: int
    peak_rss_bytes: int
    identical: int | None
    stopped: bool = False

    @property
    def speed(self) -> float:
        return 0.0 if self.stopped else self.output_tokens / self.seconds


@dataclass(slots=True)
class Configuration:
    """A named way to run the job, and what its runs gave."""

    name: str
    task: Task
    speeds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0
    kv_peak_bytes: int | None = None
    output_tokens: int = 0
    identical: list[int] = field(default_factory=list)
    trial: Trial | None = None
    size: int = 0

    def add_trial(self, trial: Trial) -> None:
        """Counts the run that was made to find the best size as the only one."""
        self.output_tokens, self.peak_rss_bytes = trial.output_tokens, trial.peak_rss_bytes
        self.seconds, self.speeds = [trial.seconds], [trial.speed]
        self.identical = [] if trial.identical is None else [trial.identical]

    def add(self, outcome: dict[str, Any], reference: Answers | None) -> None:
        answers = outcome["answers"]
        self.output_tokens = sum(tokens for _, tokens in answers.values())
        self.seconds.append(outcome["seconds"])
        self.speeds.append(self.output_tokens / outcome["seconds"])
        self.peak_rss_bytes = max(self.peak_rss_bytes, outcome["peak_rss_bytes"])
        self.kv_peak_bytes = outcome.get("kv_peak_bytes")
        if reference is not None:
            self.identical.append(sum(list(answers.get(custom_id, ())) == answer for custom_id, answer in reference.items()))

    def row(self, reference: Answers | None) -> dict[str, Any]:
        speeds = {"median": median(self.speeds), "min": min(self.speeds), "max": max(self.speeds)}
        return {
            "name": self.name,
            "kind": self.task.kind,
            "options": dict(self.task.options) if self.task.kind != "longdraft" else None,
            "tokens_per_second": {name: round(value, 2) for name, value in speeds.items()},
            "seconds": [round(value, 3) for value in self.seconds],
            "output_tokens": self.output_tokens,
            "peak_rss_bytes": self.peak_rss_bytes,
            "kv_peak_bytes": self.kv_peak_bytes,
            "identical_to_reference": [min(self.identical), len(reference)] if reference is not None and self.identical else None,
            "stopped": self.trial is not None and self.trial.stopped,
        }


def run_bench(request: BenchRequest, *, cache_dir: Path, quiet: bool) -> dict[str, Any]:
    """The whole benchmark: reference (cached), sweep of the comparison (cached), then the interleaved repeats, the bound among them.

    Raises Failure where a run fails, with its reason.
    """
    store = cache_dir / "bench"
    with _display(quiet) as display:
        session = _Session(request, store, display)
        reference = session.reference() if request.check else None
        configurations = session.configurations(reference)
        repeated = session.contenders(configurations)
        stretches: list[dict[str, Any]] = []
        device = "cpu"
        for repeat in range(request.repeats):
            turn = f"({repeat + 1}/{request.repeats})"
            for configuration in repeated:
                if request.bound:
                    known = stretches[0] if stretches else None
                    stretches.append(session.run(request.task("bound", known), f"the fastest matrix product {turn}")["bound"])
                outcome = session.run(configuration.task, f"{configuration.name} {turn}")
                configuration.add(outcome, reference)
                device = outcome["device"]
    return _report(request, device, configurations, reference, stretches)


def _report(
    request: BenchRequest, device: str, configurations: list[Configuration], reference: Answers | None, stretches: list[dict[str, Any]]
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "job": request.job,
        "lines": len(request.lines),
        "device": describe(device),
        "dtype": request.dtype,
        "repeats": request.repeats,
        "runs": [configuration.row(reference) for configuration in configurations],
    }
    first, *others = configurations
    report["ratios"] = [
        {"of": first.name, "to": other.name, **statistics.ratio(first.speeds[: len(other.speeds)], other.speeds).row()}
        for other in others
        if other.speeds[0]
    ]
    if stretches:
        report["bound"] = bound.of_job(stretches, first.output_tokens)
        for run in report["runs"]:
            run["of_bound"] = round(run["tokens_per_second"]["median"] / report["bound"]["tokens_per_second"], 3)
    return report


@dataclass(slots=True)
class _Session:
    request: BenchRequest
    store: Path
    display: Progress
    prompts: Prompts | None = None
    fastest: float | None = None
    """Seconds of the fastest peer so far."""

    def reference(self) -> Answers:
        """Answers of transformers' `generate`, one line at a time, float32: what every configuration should say.

        Kept line by line, so that the first lines of a job, or a job that was interrupted, need no second look.
        """
        path = self.store / f"reference-{self.request.model_digest(version('transformers'))}.json"
        kept: dict[str, list[Any]] = _read(path) or {}
        keys = {line.custom_id: self.request.line_digest(line) for line in self.request.lines}
        missing = tuple(line for line in self.request.lines if keys[line.custom_id] not in kept)
        for first in range(0, len(missing), _REFERENCE_LINES):
            part = missing[first : first + _REFERENCE_LINES]
            task = replace(self.request.task("transformers", {"batch_size": 1}, dtype="float32"), lines=part)
            answers = self.run(task, f"reference, one by one, {first} of {len(missing)} (kept for the next time)")["answers"]
            kept |= {keys[custom_id]: answer for custom_id, answer in answers.items()}
            _write(path, kept)
        return {custom_id: kept[key] for custom_id, key in keys.items()}

    def configurations(self, reference: Answers | None) -> list[Configuration]:
        found = []
        for changes in self.request.ours:
            name = ", ".join(["longdraft", *(f"{name} {value}" for name, value in changes.items())])
            found.append(Configuration(name, self.request.task("longdraft", self.request.engine_options(changes))))
        for peer in self.request.peers:
            families = [family for family in PEERS[peer].families if self.request.peer_drafts or not family.drafts]
            plain: Configuration | None = None
            for family in families:
                found.append(self._best(peer, family, plain, reference))
                plain = plain or found[-1]
        return found

    def contenders(self, configurations: list[Configuration]) -> list[Configuration]:
        """Those to be repeated: all, or ours and the peers near the fastest; the others keep their trial."""
        if not self.request.contenders:
            return configurations
        fastest = max((one.trial.speed for one in configurations if one.trial is not None), default=0.0)
        slower = [one for one in configurations if one.trial is not None and one.trial.speed < _NEAR * fastest]
        for one in slower:
            assert one.trial is not None
            one.add_trial(one.trial)
        return [one for one in configurations if one not in slower]

    def _best(self, peer: str, family: Family, plain: Configuration | None, reference: Answers | None) -> Configuration:
        """Tries each size once on the whole job; what was found is kept for this job, model, format and machine.

        plain: the peer's best without its own speculation; where only contenders are repeated, the speculation is tried at that size.
        """
        wanted = family.sizes or self.request.batch_sizes
        if self.request.contenders and plain is not None and family.sizes is None:
            wanted = (plain.size,)
        sizes = sorted({min(size, len(self.request.lines)) for size in wanted}, reverse=self.request.contenders)
        made = {size: self.request.task(peer, family.options(size)) for size in sizes}
        best, trial = sizes[0], None
        if len(sizes) > 1 or self.request.contenders:
            key = self.request.digest(peer, family.name, self._version(peer), self.request.dtype, platform.node(), os.cpu_count(), "trials")
            path = self.store / f"sweep-{key}.json"
            kept: dict[str, Any] = _read(path) or {}
            for size in sizes:
                if str(size) not in kept:
                    kept[str(size)] = asdict(self._try(made[size], f"{peer}, trying {family.name.format(size)}", reference))
                    _write(path, kept)
                tried = Trial(**kept[str(size)])
                if not tried.stopped:
                    self.fastest = min(self.fastest or tried.seconds, tried.seconds)
            trials = {size: Trial(**kept[str(size)]) for size in sizes}
            best = max(sizes, key=lambda size: trials[size].speed)
            trial = trials[best]
        return Configuration(f"{peer}, {family.name.format(best)}", made[best], trial=trial, size=best)

    def _try(self, task: Task, label: str, reference: Answers | None) -> Trial:
        if self.request.contenders and self.fastest is not None:
            outcome = self.run(task, label, stop_after=STOP_TIMES * self.fastest)
        else:
            outcome = self.run(task, label)
        if outcome.get("stopped"):
            return Trial(outcome["seconds"], 0, 0, None, stopped=True)
        made = Configuration(label, task)
        made.add(outcome, reference)
        return Trial(made.seconds[0], made.output_tokens, made.peak_rss_bytes, made.identical[0] if made.identical else None)

    def _version(self, peer: str) -> str:
        return version("transformers") if peer == "transformers" else environments.stamp(self.request.peers_folder, peer)

    def run(self, task: Task, label: str, *, stop_after: float | None = None) -> dict[str, Any]:
        """One run in a process of its own, stopped so many seconds after everything is loaded. Raises Failure with its reason."""
        bar = self.display.add_task(label, total=len(task.lines))
        if task.kind in _IN_OUR_ENVIRONMENT:
            command, environment, data = [sys.executable, "-m", "service.cli.bench.child"], None, task.encode()
        else:
            prompts = self.prompts = self.prompts or Prompts(task)
            scratch = self.store / "peers" / f"{task.kind}-{self.request.model_digest()}"
            scratch.parent.mkdir(parents=True, exist_ok=True)
            command, environment = environments.driver(self.request.peers_folder, task.kind)
            data = orjson.dumps(wire_job(prompts, scratch, len(os.sched_getaffinity(0)), dict(task.options)))
        process = subprocess.Popen(  # noqa: S603 - our own module, in our environment or a peer's
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
        )
        try:
            outcome = self._follow(process, task, data, bar, stop_after)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the servers that it started
            process.wait()
        self.display.remove_task(bar)
        if "tokens" in outcome:
            assert self.prompts is not None
            outcome["answers"] = {
                prompt.custom_id: list(self.prompts.answer(prompt, outcome["tokens"][prompt.custom_id])) for prompt in self.prompts.all
            }
        return outcome

    def _follow(self, process: subprocess.Popen[bytes], task: Task, data: bytes, bar: Any, stop_after: float | None) -> dict[str, Any]:
        import threading

        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = None if stop_after is None else threading.Timer(stop_after, stop)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        noise: list[bytes] = []
        drain = threading.Thread(target=lambda stream: noise.extend(stream), args=(process.stderr,), daemon=True)
        drain.start()
        with suppress(BrokenPipeError):  # it has died, and says why below
            process.stdin.write(data)
            process.stdin.close()
        for line in process.stdout:
            event: dict[str, Any] = orjson.loads(line)
            if "error" in event:
                raise Failure(event["error"])
            if "seconds" in event:
                if timer is not None:
                    timer.cancel()
                return event
            if timer is not None and not timer.is_alive() and not stopped.is_set():
                timer.start()  # the first news is that everything is loaded
            self.display.update(bar, completed=event["done"])
        if stopped.is_set():
            return {"stopped": True, "seconds": stop_after, "answers": {}}
        if timer is not None:
            timer.cancel()
        drain.join(5)
        last = noise[-1].decode("utf-8", "replace").strip() if noise else "no message"
        raise Failure(f"The run of {task.kind} ended with exit code {process.wait()}: {last}")


@contextmanager
def _display(quiet: bool) -> Iterator[Progress]:
    from rich.progress import Progress

    with Progress(*count_columns(), console=console(stderr=True), disable=quiet, transient=True) as progress:
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
