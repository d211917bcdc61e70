"""Lines of output and error files: the exact bytes, and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from service.domain.ids import batch_request_id, request_id
from service.domain.line import LineOutcome


@dataclass(frozen=True, slots=True)
class ResultLine:
    """A parsed line. `status_code`, `request_id` and `body` are None where the line was never executed; then `error_code` says why."""

    id: str
    custom_id: str | None
    status_code: int | None
    request_id: str | None
    body: dict[str, Any] | None
    error_code: str | None
    error_message: str | None


def encode_result(outcome: LineOutcome) -> bytes:
    """The line for this outcome, newline included. The same outcome always gives the same bytes."""
    response = error = None
    if outcome.body is not None:
        response = {
            "status_code": outcome.status_code,
            "request_id": request_id(outcome.batch_id, outcome.line_no),
            "body": outcome.body,
        }
    else:
        error = {"code": outcome.error_code, "message": outcome.error_message}
    line = {
        "id": batch_request_id(outcome.batch_id, outcome.line_no),
        "custom_id": outcome.custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def pack_results(outcomes: Iterable[LineOutcome]) -> tuple[bytes, list[tuple[LineOutcome, int, int]]]:
    """The bytes of a segment and where each outcome's line lies in it: (outcome, offset, length), newline included in the length."""
    data = bytearray()
    placed = []
    for outcome in outcomes:
        line = encode_result(outcome)
        placed.append((outcome, len(data), len(line)))
        data += line
    return bytes(data), placed


def decode_result(line: bytes) -> ResultLine:
    """Parses what `encode_result` wrote. Raises ValueError or KeyError on anything else."""
    record = orjson.loads(line)
    response, error = record["response"] or {}, record["error"] or {}
    return ResultLine(
        id=record["id"],
        custom_id=record["custom_id"],
        status_code=response.get("status_code"),
        request_id=response.get("request_id"),
        body=response.get("body"),
        error_code=error.get("code"),
        error_message=error.get("message"),
    )
