"""The outermost layer: a request id on everything, a log line, and the last net for bugs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response, unexpected
from service.errors import NotFound

log = structlog.get_logger(__name__)


METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"})

Observe = Callable[[str, str, int, float], None]
"""(method, route template, status, seconds), after each request."""


class Guard:
    """ASGI middleware (not Starlette's base class, which would buffer streams)."""

    def __init__(self, app: ASGIApp, observe: Observe | None = None) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        begun = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, request_id)
            await send(message)

        try:
            if "\0" in scope["path"]:  # nothing stored can have such an id, and PostgreSQL would choke on the question
                await error_response(NotFound("Invalid URL: it contains a NUL character."))(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:
            response = unexpected(error, request_id=request_id, method=scope["method"], path=scope["path"])
            if status:
                raise  # too late for another answer: the server cuts the connection, so the client sees a broken body
            await response(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - begun
            ms = round(seconds * 1000, 1)
            log.debug("request", request_id=request_id, method=scope["method"], path=scope["path"], status=status, ms=ms)
            if self._observe is not None:
                self._observe(scope["method"] if scope["method"] in METHODS else "other", _route(scope), status, seconds)


def _add_headers(message: MutableMapping[str, Any], request_id: str) -> None:
    message["headers"] = [
        *message["headers"],
        (b"x-request-id", request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
    ]


def _route(scope: Scope) -> str:
    """The template of the path (`/v1/files/{file_id}`), which has no ids in it."""
    return str(getattr(scope.get("route"), "path", "none"))
