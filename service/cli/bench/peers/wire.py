"""What a driver and `bench` say to each other. Standard library only: it runs in every peer's environment.

In: one JSON object on stdin. Out: JSON lines on the original stdout, `{"done": n}` while it goes on, at the end the tokens of every answer.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    id: str
    tokens: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Job:
    """`model`: a folder in Hugging Face's layout. `scratch`: a folder for what is worth keeping (converted weights). `ends`: end tokens."""

    model: str
    scratch: str
    prompts: list[Prompt]
    ends: list[int]
    threads: int
    options: dict[str, Any]


Answers = dict[str, list[int]]


@dataclass
class Stopwatch:
    """`start` when everything is loaded; `done` now and then with the number of finished prompts, at the start with none."""

    emit: Callable[[dict[str, Any]], None]
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        self.done(0)
        self.started = time.perf_counter()

    def done(self, count: int) -> None:
        self.emit({"done": count})

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


def serve(run: Callable[[Job, Stopwatch], Answers], *, children: bool = False) -> None:
    """Runs the job on stdin. `children`: the engine is a child process, whose memory is the one to report."""
    # Engines print to stdout as they please; the parent reads it. Ours is a copy, theirs becomes stderr.
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event).encode() + b"\n")

    values = json.loads(sys.stdin.buffer.read())
    job = Job(**{**values, "prompts": [Prompt(**prompt) for prompt in values["prompts"]]})
    watch = Stopwatch(emit)
    answers = run(job, watch)
    seconds = watch.seconds
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss * 1024
    emit({"seconds": seconds, "tokens": answers, "device": "cpu", "peak_rss_bytes": peak})
    events.flush()
    os._exit(0)  # engines with threads of their own hang or crash on the way out; everything is said


def cut(tokens: list[int], prompt: Prompt, ends: list[int]) -> list[int]:
    """An answer up to its limit and its first end token, that one included."""
    tokens = tokens[: prompt.max_tokens]
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]
