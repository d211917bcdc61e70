"""Longdraft's own run of a benchmark: through the same runner that a worker uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from service.adapters.engine_runner import EngineRunner
from service.cli.bench.child import Measured
from service.cli.bench.plan import Task
from service.cli.output import Failure
from service.config import EngineSettings, ModelEntry
from service.domain.line import LineWork, Outcome
from service.domain.request_body import CHAT


def run(task: Task, progress: Callable[[int], None]) -> Measured:
    """Raises Failure if a line gets no answer: a benchmark of refusals measures nothing."""
    entry = ModelEntry(**{**task.entry, "dtype": task.dtype})
    runner = EngineRunner({task.model: entry}, EngineSettings(**task.options), Path(task.cache_dir))
    runner.load(task.model)
    measured = Measured(0.0, device=runner.device)
    started = time.perf_counter()
    for outcome in runner.run(_work(task)):
        if outcome.outcome is not Outcome.SUCCEEDED or outcome.body is None:
            raise Failure(f"Line {outcome.line_no} ({outcome.custom_id}) failed: {outcome.error_message or outcome.body}")
        choice = outcome.body["choices"][0]
        text = choice["message"]["content"] if task.lines[0].endpoint == CHAT else choice["text"]
        measured.answers[str(outcome.custom_id)] = (text, outcome.usage.output_tokens)
        progress(len(measured.answers))
    measured.seconds = time.perf_counter() - started
    measured.kv_peak_bytes = runner.stats().kv_peak_bytes
    runner.close()
    return measured


def _work(task: Task) -> Iterator[LineWork]:
    for line in task.lines:
        yield LineWork("bench", line.line_no, 0, line.custom_id, task.model, line.endpoint, line.body)
