"""What a process shows to its operators, on a port of its own: /healthz, /readyz and /metrics. Users never reach it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog

from service.config import Settings
from service.errors import ConfigError, LongdraftError

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = 10

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a process can do its work now, and why it says so."""

    ready: bool
    reason: str


@contextmanager
def ops_server(settings: Settings, *, metrics: Callable[[], bytes], ready: Callable[[], Readiness]) -> Iterator[None]:
    """Serves in threads of its own for as long as the block lasts; nothing where `ops_port` is empty.

    A `ready` that raises a LongdraftError (the database is away) is not ready. Raises ConfigError where the port is taken.
    """
    if settings.ops_port is None:
        yield
        return
    host = settings.ops_host or settings.host
    try:
        server = ThreadingHTTPServer((host, settings.ops_port), _handler(metrics, ready))
    except OSError as error:
        message = f"Cannot listen on {host}:{settings.ops_port}: {error.strerror}. Set ops_port to a free port."
        raise ConfigError(message, param="ops_port") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="ops", daemon=True)
    thread.start()
    log.info("ops_ready", host=host, port=settings.ops_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _handler(metrics: Callable[[], bytes], ready: Callable[[], Readiness]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/healthz":
                self._answer(200, b'{"status": "ok"}')
            elif path == "/readyz":
                state = _ask(ready)
                self._answer(200 if state.ready else 503, json.dumps({"ready": state.ready, "reason": state.reason}).encode())
            elif path == "/metrics":
                self._answer(200, metrics(), METRICS_TYPE)
            else:
                self._answer(404, b'{"error": "there are /healthz, /readyz and /metrics"}')

        def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Probes come every few seconds and say nothing new."""

    return Handler


def _ask(ready: Callable[[], Readiness]) -> Readiness:
    try:
        return ready()
    except LongdraftError as error:
        return Readiness(False, error.message)
