"""JSON as RFC 8259 means it, and nothing beyond: orjson's strictness plus depth and repeated keys.

orjson already refuses NaN, infinities (also as 1e400 or 5,000 digits), bad UTF-8, lone surrogates and raw control characters.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import orjson

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
"""A JSON string; possessive, so it is linear on any input."""


class InvalidJson(ValueError):
    """The message says what and where, fit for a user's eyes."""


def strict_loads(data: bytes, *, max_depth: int) -> Any:
    """Parses one JSON document.

    Raises:
        InvalidJson: not JSON, nested deeper than `max_depth` containers, or an object with a repeated key.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidJson(_explain(data, error)) from None
    # Outside of strings, valid JSON has one colon a key: fewer keys in the parsed value means that some were overwritten. Counting
    # costs a few microseconds a line, where parsing again with a hook would cost more than everything else together.
    if _count_keys(value, max_depth) != _STRING.sub(b"", data).count(b":"):
        raise InvalidJson(f"the key {_repeated_key(data)} occurs more than once in an object")
    return value


def _count_keys(value: Any, max_depth: int) -> int:
    """Keys of all objects in `value`, level by level: no recursion, so depth cannot exhaust the stack."""
    keys = depth = 0
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        if depth > max_depth:
            raise InvalidJson(f"it is nested deeper than {max_depth} levels")
        below: list[Any] = []
        for container in level:
            items: Iterable[Any] = container
            if type(container) is dict:
                keys += len(container)
                items = container.values()
            below += [item for item in items if type(item) is dict or type(item) is list]
        level = below
    return keys


def _repeated_key(data: bytes) -> str:
    """The first repeated key, quoted and cut. Called for documents known to have one and a bounded depth."""
    repeated: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        repeated.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)

    json.loads(data, object_pairs_hook=note)
    return json.dumps(repeated[0][:64], ensure_ascii=False)


def _explain(data: bytes, error: orjson.JSONDecodeError) -> str:
    if b"\x00" in data:
        return "it contains NUL bytes; is the file UTF-16 or binary? It must be UTF-8 text"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"it is not UTF-8: byte 0x{data[bad.start]:02x} at position {bad.start + 1}"
    near = text[max(0, error.pos - 10) : error.pos + 10]
    return f"{error.msg.partition(': line ')[0]} at character {error.pos + 1}" + (f", near {near!r}" if near.strip() else "")
