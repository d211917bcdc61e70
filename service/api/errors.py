"""Every error leaves as `{"error": {"message", "type", "param", "code"}}`, whoever raised it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from service.api.ranges import RangeNotSatisfiable
from service.api.wire import Json
from service.errors import Conflict, InvalidRequest, LongdraftError, Unauthenticated, Unavailable

log = structlog.get_logger(__name__)

_INTERNAL = LongdraftError("The server had an error while answering. Try again; if it persists, tell the operator the request id.")
_MISSING, _UNKNOWN = "missing_required_parameter", "unknown_parameter"


def error_response(error: LongdraftError) -> Response:
    """The wire form of an error, with the headers that steer an SDK's automatic repeats."""
    shown = _INTERNAL if error.status >= 500 and not isinstance(error, Unavailable) else error
    body = {"error": {"message": shown.message, "type": shown.type, "param": shown.param, "code": shown.code}}
    return Json(body, status_code=shown.status, headers=_headers(shown))


def invalid_fields(problems: Sequence[Mapping[str, Any]], *, skip: int = 0) -> InvalidRequest:
    """The first of pydantic's problems as an error that names the parameter; `skip` leaves out parts of its location."""
    problem = problems[0]
    param = ".".join(str(part) for part in problem["loc"][skip:] if part != "[key]") or None
    kind = problem["type"]
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code=_MISSING)
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{param}'.", param=param, code=_UNKNOWN)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return InvalidRequest(f"Invalid '{param}': {_lowered(problem['msg'])}{_shown(problem.get('input'))}.", param=param, code=code)


def install_error_handlers(app: FastAPI) -> None:
    """Replaces FastAPI's own error shapes."""
    app.add_exception_handler(LongdraftError, _expected)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)


def unexpected(error: Exception, *, request_id: str, method: str, path: str) -> Response:
    """A bug: logged with its traceback, answered without it."""
    log.error("request failed", request_id=request_id, method=method, path=path, exc_info=error)
    return error_response(_INTERNAL)


async def _expected(request: Request, error: Exception) -> Response:
    assert isinstance(error, LongdraftError)
    if error.status >= 500:
        log.error("request failed", request_id=request.state.request_id, path=request.url.path, code=error.code, error=error.message)
    return error_response(error)


async def _validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_fields(error.errors(), skip=1))


async def _http(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    refusal = InvalidRequest(str(error.detail))
    if error.status_code == 404:
        refusal = InvalidRequest(
            f"Invalid URL ({request.method} {request.url.path[:200]}). This server has /v1/files, /v1/batches and /v1/models; see /docs.",
            code="unknown_url",
        )
    elif error.status_code == 405:
        refusal = InvalidRequest(f"Not allowed to {request.method} on {request.url.path[:200]}; see /docs.", code="method_not_allowed")
    refusal.status = error.status_code
    response = error_response(refusal)
    response.headers.update(error.headers or {})
    return response


def _headers(error: LongdraftError) -> dict[str, str]:
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, Unavailable):
        return {"retry-after": "1"}
    if isinstance(error, RangeNotSatisfiable):
        return {"content-range": f"bytes */{error.size}"}
    if isinstance(error, Conflict) or error.status == 409:
        # The SDKs repeat a 409 by themselves; here that can never help.
        return {"x-should-retry": "false"}
    return {}


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _shown(value: object) -> str:
    return f", got {value!r}"[:80] if isinstance(value, str | int | float | bool) else ""
