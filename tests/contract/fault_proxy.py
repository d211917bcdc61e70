"""An HTTP proxy that misbehaves on purpose: one queued fault for each request that matches it, then it just forwards."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

Fault = Callable[["_Handler", bytes], None]
"""What to do with a request and its body instead of forwarding it."""


@dataclass
class FaultProxy:
    """`with FaultProxy(upstream) as proxy: proxy.once("PUT", "", slow_down)`; `proxy.seen` lists what came in, faults included."""

    upstream: str
    faults: list[tuple[str, str, Fault]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def once(self, method: str, part: str, fault: Fault, *, times: int = 1) -> None:
        """The next `times` requests of this method whose target contains `part` meet this fault."""
        self.faults += [(method, part, fault)] * times

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, method: str, target: str) -> Fault | None:
        self.seen.append(f"{method} {target}")
        for index, (wanted, part, fault) in enumerate(self.faults):
            if wanted == method and part in target:
                del self.faults[index]
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.take(self.command, self.path)
        if fault is not None:
            fault(self, body)
        else:
            self.answer(*self.forward(body))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        host = urlsplit(self.proxy.upstream)
        upstream = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            reply = upstream.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            upstream.close()

    def answer(self, status: int, headers: dict[str, str], data: bytes, *, only: int | None = None) -> None:
        """`only`: promise the whole body and hang up after so many bytes."""
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", headers.get("content-length")) if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:only])
        if only is not None:
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def slow_down(handler: _Handler, _: bytes) -> None:
    """503, not forwarded."""
    handler.answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>")


def not_implemented(handler: _Handler, _: bytes) -> None:
    """501: a store that does not know this. Not forwarded."""
    xml = (
        b"<Error><Code>NotImplemented</Code><Message>A header you provided implies functionality that is not implemented.</Message></Error>"
    )
    handler.answer(501, {"Content-Type": "application/xml"}, xml)


def ignore_range(handler: _Handler, body: bytes) -> None:
    """The whole object, whatever range was asked for."""
    del handler.headers["Range"]
    handler.answer(*handler.forward(body))


def error_inside_200(handler: _Handler, _: bytes) -> None:
    """What a multipart completion may answer: 200, and an error in the body. Not forwarded."""
    xml = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InternalError</Code><Message>Please try again.</Message></Error>'
    handler.answer(200, {"Content-Type": "application/xml"}, xml)


def claim_success(handler: _Handler, _: bytes) -> None:
    """200 for something that was never stored."""
    handler.answer(200, {"ETag": '"0123456789abcdef0123456789abcdef"'}, b"")


def reset(handler: _Handler, _: bytes) -> None:
    """Hangs up without forwarding."""
    handler.hang_up()


def lose_reply(handler: _Handler, body: bytes) -> None:
    """Forwards and hangs up: done, but nobody hears of it."""
    handler.forward(body)
    handler.hang_up()


def damage(handler: _Handler, body: bytes) -> None:
    """Forwards with the last byte changed."""
    handler.answer(*handler.forward(body[:-1] + bytes([body[-1] ^ 1])))


def cut_after(size: int) -> Fault:
    """Answers `size` bytes of the body and hangs up."""

    def cut(handler: _Handler, body: bytes) -> None:
        handler.answer(*handler.forward(body), only=size)

    return cut
