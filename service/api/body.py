"""JSON bodies: read with a limit, parsed, and refused where they could not be stored."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Request

from service.config import Limits
from service.errors import InvalidRequest, TooLarge, UnsupportedEncoding


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as an object.

    Raises:
        TooLarge: over `max_body_bytes`; nothing beyond the limit is read.
        UnsupportedEncoding: compressed.
        InvalidRequest: not UTF-8 JSON, not an object, nested too deep, or with a NUL character in a string.
    """
    refuse_compressed(request)
    declared = request.headers.get("content-length", "")
    too_large = TooLarge(f"The request body is over the limit of {limits.max_body_bytes:,} bytes.")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise too_large
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limits.max_body_bytes:
            raise too_large
    return parse_object(bytes(raw), max_depth=limits.max_json_depth)


def parse_object(raw: bytes, *, max_depth: int) -> dict[str, Any]:
    """Pure part of `read_json`."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_json")
    _check_values(body, max_depth)
    return body


def refuse_compressed(request: Request) -> None:
    """Raises UnsupportedEncoding for any Content-Encoding: sizes must mean what they say."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedEncoding(f"Content-Encoding {encoding[:40]!r} is not taken: send the body uncompressed.")


def _check_values(body: dict[str, Any], max_depth: int) -> None:
    """One walk, without recursion: a hostile body may be as deep as the parser allows (1,024)."""
    level: list[Any] = [body]
    depth = 1
    while level:
        if depth > max_depth:
            raise InvalidRequest(f"The request body is nested deeper than {max_depth} levels.", code="too_deep")
        below: list[Any] = []
        for container in level:
            members = [*container.keys(), *container.values()] if isinstance(container, dict) else container
            for member in members:
                if isinstance(member, dict | list):
                    below.append(member)
                elif isinstance(member, str) and "\0" in member:
                    raise InvalidRequest("The request body must not contain NUL characters.", code="invalid_value")
        level, depth = below, depth + 1
