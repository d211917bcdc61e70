"""Between the lines that a worker feeds and the requests that the engine pulls, and back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from engine.drafters.builtin import OFF
from engine.engine import Engine
from engine.types import FinishReason, Request, Result, TokenLedger
from service.adapters.engine_runner.requests import build_request
from service.domain.line import LineOutcome, LineWork, Outcome
from service.domain.request_body import CHAT, GenerationRequest, LineRejected, parse_body
from service.domain.response_body import chat_completion_body, completion_body, completion_id
from service.domain.usage import Usage, Work


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model that is loaded. `name`: as it is registered. `fingerprint`: what decides an answer besides the request."""

    name: str
    engine: Engine
    fingerprint: str


class Feed:
    """The engine's requests, made from lines as the engine pulls them, and the way back from its results.

    A rejected line never reaches the engine, and the engine yields only what it ran. So when nothing is running the feed pauses (ends the
    engine's run) to let rejections out: whoever feeds us may be waiting for exactly those.
    """

    def __init__(self, loaded: Loaded, lines: Iterator[LineWork | None]) -> None:
        self._loaded = loaded
        self._lines = lines
        self._running: dict[str, tuple[LineWork, GenerationRequest]] = {}
        self._rejected: list[LineOutcome] = []
        self.exhausted = False

    def __iter__(self) -> Iterator[Request | None]:
        while self._running or not self._rejected:
            try:
                line = next(self._lines)
            except StopIteration:
                self.exhausted = True
                return
            if line is None:
                yield None
            elif (request := self._admit(line)) is not None:
                yield request

    def take_rejected(self) -> list[LineOutcome]:
        rejected, self._rejected = self._rejected, []
        return rejected

    def outcome(self, result: Result) -> LineOutcome | None:
        """None for an aborted request: nobody wants it any more."""
        line, asked = self._running.pop(result.id)
        if result.finish_reason is FinishReason.ABORTED:
            return None
        work = _work(result.ledger)
        if result.finish_reason is FinishReason.ERROR:
            message = result.error or "the engine gave no reason"
            return _outcome(line, Outcome.FAILED, error_code="engine_error", error_message=message, work=work)
        usage = Usage(input_tokens=result.ledger.prompt, cached_tokens=result.ledger.cached, output_tokens=result.ledger.generated)
        build = chat_completion_body if asked.endpoint == CHAT else completion_body
        body = build(
            id=completion_id(line.endpoint, line.batch_id, line.line_no),
            created=int(time.time()),
            model=self._loaded.name,
            text=result.text,
            finish_reason=result.finish_reason.value,
            usage=usage,
            system_fingerprint=f"{self._loaded.fingerprint}-{result.drafter or OFF}",
        )
        return _outcome(line, Outcome.SUCCEEDED, status_code=200, body=body, usage=usage, work=work, drafter=result.drafter)

    def _admit(self, line: LineWork) -> Request | None:
        try:
            asked = parse_body(line.endpoint, line.body)
            request = build_request(self._loaded.engine, line, asked)
        except LineRejected as refusal:
            self._rejected.append(_outcome(line, Outcome.REJECTED, status_code=refusal.status, body=refusal.body))
            return None
        self._running[request.id] = (line, asked)
        return request


def _outcome(line: LineWork, outcome: Outcome, **values: Any) -> LineOutcome:
    return LineOutcome(line.batch_id, line.line_no, line.group_id, line.custom_id, outcome, **values)


_SHARED_COUNTERS = tuple({f.name for f in fields(Work)} & {f.name for f in fields(TokenLedger)})


def _work(ledger: TokenLedger) -> Work:
    return Work(**{name: getattr(ledger, name) for name in _SHARED_COUNTERS})
