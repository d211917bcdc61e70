"""A deterministic stand-in for the engine: answers from a hash of the request, usage from sizes, a witness log of what it ran.

For fault and load tests, where the model is not the point. It can be told to die at a named line, the way a broken engine would.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from service.config import Settings, Standin
from service.domain.line import LineOutcome, LineWork, Outcome
from service.domain.request_body import GenerationRequest, LineRejected, parse_body
from service.domain.response_body import Choice, answer_body, completion_id
from service.domain.usage import Usage, Work
from service.errors import ModelUnavailable
from service.ports import RunnerStats

IDLE_SECONDS = 0.002
CREATED = 1_700_000_000
"""Answers carry a fixed time: the same line always gives the same bytes."""
BYTES_PER_TOKEN = 4
CONTEXT = 4096
"""Tokens of prompt and answer that it says it has room for."""


class StandinRunner:
    """ports.InferenceRunner without a model. Each line takes `delay` seconds, `capacity` of them at once."""

    def __init__(self, settings: Settings) -> None:
        self._options: Standin = settings.standin
        self._models = frozenset(settings.models)
        self._loaded: str | None = None
        self._aborted: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._witness = _Witness(self._options.witness) if self._options.witness else None
        self._running = 0
        self._busy_ns = 0

    def load(self, model: str) -> None:
        if model not in self._models:
            raise ModelUnavailable(f"No model is registered as {model!r}.")
        self._loaded = model

    def run(self, lines: Iterable[LineWork | None]) -> Iterator[LineOutcome]:
        source = iter(lines)
        live: deque[tuple[float, LineWork]] = deque()
        open_ended = True
        while open_ended or live:
            progressed = False
            while open_ended and len(live) < self.capacity:
                try:
                    line = next(source)
                except StopIteration:
                    open_ended = False
                    break
                if line is None:
                    break
                self._start(line)
                live.append((time.monotonic() + self._options.delay, line))
            self._running = len(live)
            for line in self._drop_aborted(live):
                self._note("abort", line)
            while live and live[0][0] <= time.monotonic():
                _, line = live.popleft()
                progressed = True
                started = time.perf_counter_ns()
                outcome = self._answer(line)
                self._busy_ns += time.perf_counter_ns() - started
                self._note("finish", line)
                yield outcome
            if not progressed:
                time.sleep(IDLE_SECONDS)

    def abort(self, keys: Collection[tuple[str, int]]) -> None:
        with self._lock:
            self._aborted.update(keys)

    def stats(self) -> RunnerStats:
        return RunnerStats(running=self._running, busy_ns=self._busy_ns, tokens_per_second=0.0, acceptance_length=1.0, context=CONTEXT)

    @property
    def capacity(self) -> int:
        return self._options.capacity

    @property
    def device(self) -> str:
        return "stand-in"

    def close(self) -> None:
        self._loaded = None

    def _drop_aborted(self, live: deque[tuple[float, LineWork]]) -> list[LineWork]:
        if not self._aborted:
            return []
        with self._lock:
            gone, self._aborted = self._aborted, set()
        dropped = [line for _, line in live if line.key in gone]
        kept = [entry for entry in live if entry[1].key not in gone]
        live.clear()
        live.extend(kept)
        return dropped

    def _start(self, line: LineWork) -> None:
        self._note("start", line)
        if line.custom_id in self._options.die_on:
            _die(self._options.die_how)

    def _answer(self, line: LineWork) -> LineOutcome:
        try:
            asked = parse_body(line.endpoint, line.body)
        except LineRejected as refusal:
            return _outcome(line, Outcome.REJECTED, status_code=refusal.status, body=refusal.body)
        usage = self._usage(line, asked)
        text = answer_text(line.body, self._options.answer_bytes)
        body = answer_body(
            asked.endpoint,
            id=completion_id(line.endpoint, line.batch_id, line.line_no),
            created=CREATED,
            model=self._loaded or line.model,
            choices=[Choice(text, "stop") for _ in range(asked.choices)],
            usage=usage,
            system_fingerprint="standin",
        )
        work = Work(
            prompt=usage.input_tokens,
            prefilled=usage.input_tokens,
            generated=usage.output_tokens,
            sampled=usage.output_tokens,
            steps=usage.output_tokens,
            decode_ns=int(self._options.delay * 1e9),
        )
        return _outcome(line, Outcome.SUCCEEDED, status_code=200, body=body, usage=usage, work=work)

    def _usage(self, line: LineWork, asked: GenerationRequest) -> Usage:
        size = len(orjson.dumps(line.body))
        answer = max(1, self._options.answer_bytes // BYTES_PER_TOKEN)
        limit = answer if asked.max_tokens is None else asked.max_tokens
        return Usage(input_tokens=max(1, size // BYTES_PER_TOKEN), output_tokens=min(answer, limit) * asked.choices)

    def _note(self, event: str, line: LineWork) -> None:
        if self._witness is not None:
            self._witness.note(event, line)


class _Witness:
    """One JSON line an event. Every line is one write to a file opened for appending, so it is there even if the process dies next."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, event: str, line: LineWork) -> None:
        record = {"event": event, "batch_id": line.batch_id, "line_no": line.line_no, "custom_id": line.custom_id, "pid": os.getpid()}
        os.write(self._descriptor, orjson.dumps({**record, "at": time.time()}) + b"\n")


def answer_text(body: dict[str, Any], size: int) -> str:
    """`size` characters that depend on nothing but the body."""
    digest = hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return (digest * (size // len(digest) + 1))[:size]


def _outcome(line: LineWork, outcome: Outcome, **values: Any) -> LineOutcome:
    return LineOutcome(line.batch_id, line.line_no, line.group_id, line.custom_id, outcome, **values)


def _die(how: str) -> None:
    if how == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(70)
    raise MemoryError("the stand-in was told to run out of memory")
