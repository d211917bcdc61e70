"""The process of one run: a Task on stdin, progress and the outcome as JSON lines on stdout. Nothing else runs here, so its peak memory is
the configuration's own."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from service.cli.bench.plan import Answer, Task
from service.errors import LongdraftError


@dataclass(slots=True)
class Measured:
    """What a run took and gave. `seconds` leaves out loading; the answers are by custom_id."""

    seconds: float
    answers: dict[str, Answer] = field(default_factory=dict)
    device: str = "cpu"
    kv_peak_bytes: int | None = None
    """KV cache that was held at most; None where an engine does not say."""

    @property
    def output_tokens(self) -> int:
        return sum(tokens for _, tokens in self.answers.values())


def main() -> None:
    # Libraries print to stdout as they please; the parent reads it. Ours is a copy, theirs becomes stderr.
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        events.write(orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE))

    task = Task.decode(sys.stdin.buffer.read())
    try:
        if task.kind == "bound":
            from service.cli.bench import bound

            emit({"seconds": 0.0, "bound": bound.measure(task)})
            return
        measured = measure(task, lambda done: emit({"done": done}))
    except LongdraftError as error:
        emit({"error": error.message})
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome = {"seconds": measured.seconds, "answers": measured.answers, "device": measured.device, "peak_rss_bytes": peak}
    emit({**outcome, "kv_peak_bytes": measured.kv_peak_bytes})


def measure(task: Task, progress: Callable[[int], None]) -> Measured:
    """Runs the task in this process. `progress` gets the number of finished lines."""
    if task.kind == "longdraft":
        from service.cli.bench.longdraft import run
    else:
        from service.cli.bench.static_batches import run
    return run(task, progress)


if __name__ == "__main__":
    main()
