"""Live runs of the engine on a job, for the benchmarks: one loaded model, an engine a run, seconds without loading."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoints import DEFAULT_MODEL, LoadedModel, default_cache_dir, load_model
from engine.config import EngineConfig
from engine.drafters.sources import BESIDE
from engine.engine import Engine
from engine.profile import Profiles
from engine.stats import EngineStats
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, Request, Result, SamplingParams

EXAMPLES = sorted((Path(__file__).parents[2] / "infra" / "examples").glob("*.jsonl"))
"""Jobs of several kinds, for benchmarks that are given none."""


@dataclass(frozen=True)
class Run:
    """`ends`: seconds from the start at which each request ended, ascending."""

    seconds: float
    results: list[Result]
    ends: list[float]
    stats: EngineStats
    kv_bytes: int
    block_bytes: int

    @property
    def generated(self) -> int:
        return sum(len(result.token_ids) for result in self.results)

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds

    @property
    def kv_peak_bytes(self) -> int:
        return self.stats.kv_blocks_peak * self.block_bytes

    def answers(self) -> dict[str, tuple[int, ...]]:
        return {result.id: result.token_ids for result in self.results}


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name, Hugging Face id or folder (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", dest="as_json", help="one JSON object on stdout instead of a table")
    return parser


def load(options: argparse.Namespace) -> LoadedModel:
    return load_model(options.model, dtype=options.dtype, device="auto")


def with_drafters(loaded: LoadedModel, drafters: Sequence[Path], where: Path) -> LoadedModel:
    """The same model, as if exactly these drafters had been packed with it: what `auto` and `portfolio` use. `where`: an empty folder."""
    for item in loaded.directory.iterdir():
        if item.name != BESIDE:
            (where / item.name).symlink_to(item.resolve())
    (where / BESIDE).mkdir()
    for folder in drafters:
        (where / BESIDE / folder.name).symlink_to(folder.resolve())
    return replace(loaded, directory=where)


def read_requests(paths: Sequence[Path], loaded: LoadedModel, *, max_tokens: int | None = None) -> list[Request]:
    """The lines of OpenAI batch files as greedy requests, in order; prompts that occur twice only once."""
    tokenizer, found = Tokenizer(loaded.tokenizer), dict[tuple[int, ...], Request]()
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            body = json.loads(line)["body"]
            prompt = tokenizer.encode_chat(body["messages"]) if "messages" in body else tokenizer.encode(body["prompt"])
            limit = max_tokens or body.get("max_tokens") or body.get("max_completion_tokens") or 128
            sampling = SamplingParams(max_tokens=limit, temperature=0.0)
            found.setdefault(prompt, Request(str(len(found)), prompt, sampling, template=str(hash(prompt[:16]))))
    return list(found.values())


def run(
    loaded: LoadedModel,
    config: EngineConfig,
    requests: Iterable[Request],
    label: str = "",
    tick: Callable[[int, int], None] | None = None,
) -> Run:
    """A fresh engine (its profile cached), all requests through it, with a progress bar on stderr where there is a screen.

    tick: told how many are answered, of how many, in place of a bar.
    """
    from rich.console import Console
    from rich.progress import Progress

    engine = Engine(loaded, config, Profiles(default_cache_dir()))
    asked = list(requests)
    for grammar in {request.sampling.grammar for request in asked if request.sampling.grammar is not None}:
        engine.grammars.compile(grammar)  # once a worker, like loading
    results, ends = [], []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=tick is not None or not console.is_terminal) as progress:
        bar = progress.add_task(label, total=len(asked))
        started = time.perf_counter()
        for result in engine.run(iter(asked)):
            if result.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                raise RuntimeError(f"request {result.id} got no answer: {result.error}")
            ends.append(time.perf_counter() - started)
            results.append(result)
            progress.advance(bar)
            if tick is not None:
                tick(len(results), len(asked))
    block = engine.limits.block_bytes
    return Run(ends[-1], results, ends, engine.stats(), engine.limits.num_blocks * block, block)


class Steps:
    """Progress of a benchmark of `count` measurements: which one is under way, how far it is, and when all will be done."""

    def __init__(self, count: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._count, self._done, self._seconds = count, 0, 0.0

    def __enter__(self) -> Steps:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def skip(self) -> None:
        """One was measured by an earlier run."""
        self._count -= 1

    @contextmanager
    def one(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Yields what is to be called with how much of it is done, and of how much."""
        bar, started = self._bars.add_task(label, total=None), time.perf_counter()
        try:
            yield lambda done, of: self._bars.update(bar, completed=done, total=of)
        finally:
            self._bars.remove_task(bar)
        self._done, self._seconds = self._done + 1, self._seconds + time.perf_counter() - started
        left = self._seconds / self._done * (self._count - self._done)
        about = f"{self._done} of {self._count}, about {left / 60:.1f} minutes left" if self._done < self._count else "done"
        self._console.print(f"{label}: {time.perf_counter() - started:.1f} s ({about})", highlight=False, soft_wrap=True)


def copies(requests: Sequence[Request], count: int) -> list[Request]:
    """`count` requests with ids of their own, from the start again where there are fewer."""
    return [replace(requests[number % len(requests)], id=str(number)) for number in range(count)]


def report(result: dict[str, Any], *, as_json: bool) -> int:
    """Prints it, rows as a table. Returns the exit status: 1 where a goal was missed."""
    if as_json:
        print(json.dumps(result))
    else:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        rows = result.get("rows", [])
        if rows:
            table = Table(box=None, header_style="dim")
            for column in rows[0]:
                table.add_column(column, justify="right")
            for row in rows:
                table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
            console.print(table)
        for name, value in result.items():
            if name != "rows":
                print(f"{name}: {round(value, 4) if isinstance(value, float) else value}")
    sys.stdout.flush()
    return int(not result.get("pass", True))
