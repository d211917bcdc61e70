"""Between the lines that a worker feeds and the requests that the engine pulls, and back."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import Any

from engine.drafters.builtin import OFF
from engine.engine import Engine
from engine.grammars import GrammarError
from engine.types import FinishReason, Request, Result, TokenLedger
from service.adapters.engine_runner.answers import Answers
from service.adapters.engine_runner.requests import Prepared, format_param, grammar_of, prepare, request_id
from service.domain.line import LineOutcome, LineWork, Outcome
from service.domain.request_body import GenerationRequest, LineRejected, parse_body
from service.domain.response_body import Made, answer_body, completion_id
from service.domain.usage import Work


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model that is loaded. `name`: as it is registered. `made`: what decides an answer besides the request and the drafter."""

    name: str
    engine: Engine
    made: Made

    @property
    def fingerprint(self) -> str:
        """`made` in short, drafter aside."""
        revision = hashlib.blake2b(self.made.revision.encode(), digest_size=4).hexdigest()
        return f"ld-{self.made.engine}-{self.made.dtype}-{revision}"


@dataclass(slots=True)
class _Line:
    """A line whose answers the engine is making. results: by choice, as they come."""

    work: LineWork
    asked: GenerationRequest
    prepared: Prepared
    results: dict[int, Result] = field(default_factory=dict)


_WAITING = 64
"""Lines whose grammars are being compiled, at most, before no more lines are taken."""


class Feed:
    """The engine's requests, made from lines as the engine pulls them, and the way back from its results.

    A line whose answer has a form waits beside the engine while that is compiled, and the others overtake it. A rejected line never reaches
    the engine, and the engine yields only what it ran. So when nothing is running the feed pauses (ends the engine's run) to let rejections
    out: whoever feeds us may be waiting for exactly those.
    """

    def __init__(self, loaded: Loaded, lines: Iterator[LineWork | None]) -> None:
        self._loaded = loaded
        self._answers = Answers(loaded.engine.tokenizer, loaded.engine.spec.eos_token_ids)
        self._lines = lines
        self._running: dict[str, _Line] = {}
        self._rejected: list[LineOutcome] = []
        self._compiling: dict[tuple[str, int], tuple[LineWork, GenerationRequest, Future[Any]]] = {}
        self._ended = False

    @property
    def exhausted(self) -> bool:
        """Every line was taken, and none waits."""
        return self._ended and not self._compiling

    def __iter__(self) -> Iterator[Request | None]:
        while (self._running or not self._rejected) and not self.exhausted:
            compiled = next((key for key, (_, _, form) in self._compiling.items() if form.done()), None)
            if compiled is not None:
                yield from self._admit(*self._compiling.pop(compiled))
            elif self._ended or len(self._compiling) >= _WAITING:
                yield None
            else:
                try:
                    line = next(self._lines)
                except StopIteration:
                    self._ended = True
                    continue
                if line is None:
                    yield None
                else:
                    yield from self._look_at(line)

    def abort(self, keys: Collection[tuple[str, int]]) -> None:
        """Forgets what has not reached the engine yet. May be called from any thread."""
        for key in keys:
            self._compiling.pop(key, None)

    def take_rejected(self) -> list[LineOutcome]:
        rejected, self._rejected = self._rejected, []
        return rejected

    def outcome(self, result: Result) -> LineOutcome | None:
        """The line's outcome with the last of its results, None before. None for an aborted line too: nobody wants it any more."""
        line = self._running[result.id]
        line.results[result.choice] = result
        if len(line.results) < len(line.prepared.requests):
            return None
        del self._running[result.id]
        results = [line.results[choice] for choice in sorted(line.results)]
        if any(one.finish_reason is FinishReason.ABORTED for one in results):
            return None
        work = sum((_work(one.ledger) for one in results), Work())
        failed = next((one for one in results if one.finish_reason is FinishReason.ERROR), None)
        if failed is not None:
            message = failed.error or "the engine gave no reason"
            return _outcome(line.work, Outcome.FAILED, error_code="engine_error", error_message=message, work=work)
        return self._answered(line, results, work)

    def _answered(self, line: _Line, results: list[Result], work: Work) -> LineOutcome:
        asked, drafter = line.asked, results[0].drafter
        usage = self._answers.usage(asked, line.prepared, results)
        id = completion_id(line.work.endpoint, line.work.batch_id, line.work.line_no)
        body = answer_body(
            asked.endpoint,
            id=id,
            created=int(time.time()),
            model=self._loaded.name,
            choices=self._answers.choices(id, asked, line.prepared, results),
            usage=usage,
            system_fingerprint=f"{self._loaded.fingerprint}-{drafter or OFF}",
            made=replace(self._loaded.made, drafter=drafter or OFF),
        )
        return _outcome(line.work, Outcome.SUCCEEDED, status_code=200, body=body, usage=usage, work=work, drafter=drafter)

    def _look_at(self, line: LineWork) -> tuple[Request, ...]:
        """The line's requests, unless they have to wait."""
        engine = self._loaded.engine
        try:
            asked = parse_body(line.endpoint, line.body)
            grammar = grammar_of(engine, asked)
        except LineRejected as refusal:
            return self._reject(line, refusal)
        form = None if grammar is None else engine.grammars.submit(grammar)
        if form is None or form.done():
            return self._admit(line, asked, form)
        self._compiling[line.key] = line, asked, form
        return ()

    def _admit(self, line: LineWork, asked: GenerationRequest, form: Future[Any] | None) -> tuple[Request, ...]:
        if form is not None and isinstance(error := form.exception(), GrammarError):
            param = format_param(asked)
            return self._reject(line, LineRejected(f"Invalid '{param}': {error}.", param=param, code="invalid_value"))
        try:
            prepared = prepare(self._loaded.engine, line, asked)
        except LineRejected as refusal:
            return self._reject(line, refusal)
        self._running[request_id(line.key)] = _Line(line, asked, prepared)
        return prepared.requests

    def _reject(self, line: LineWork, refusal: LineRejected) -> tuple[Request, ...]:
        self._rejected.append(_outcome(line, Outcome.REJECTED, status_code=refusal.status, body=refusal.body))
        return ()


def _outcome(line: LineWork, outcome: Outcome, **values: Any) -> LineOutcome:
    return LineOutcome(line.batch_id, line.line_no, line.group_id, line.custom_id, outcome, **values)


_SHARED_COUNTERS = tuple({f.name for f in fields(Work)} & {f.name for f in fields(TokenLedger)})


def _work(ledger: TokenLedger) -> Work:
    return Work(**{name: getattr(ledger, name) for name in _SHARED_COUNTERS})
