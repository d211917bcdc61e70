"""A sort key that puts prompts with a common beginning side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

import orjson

LEVELS = (64, 256, 1024, 4096, 16384, 65536)
"""Bytes of prompt that each digest covers. Four times a level, as a prefix tree of that fan-in would: an instruction, a long system
prompt and a whole shared document each get a level of their own."""

DIGEST_BYTES = 8
"""Collisions cost a little locality and nothing else."""


def prefix_key(body: Mapping[str, Any]) -> bytes:
    """Digests of growing prefixes of the prompt, concatenated: at most 48 bytes, ending with the level that holds the whole prompt.

    Works on bodies nobody has checked yet: what is not a prompt counts as an empty one.
    """
    prompt = prompt_bytes(body, LEVELS[-1])
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    key, covered = b"", 0
    for level in LEVELS:
        digest.update(prompt[covered:level])
        key += digest.digest()
        covered = level
        if level >= len(prompt):
            break
    return key


def shared_levels(a: bytes, b: bytes) -> int:
    """How many levels two keys have in common."""
    steps = range(0, min(len(a), len(b)), DIGEST_BYTES)
    return sum(1 for _ in takewhile(lambda i: a[i : i + DIGEST_BYTES] == b[i : i + DIGEST_BYTES], steps))


def prompt_bytes(body: Mapping[str, Any], limit: int) -> bytes:
    """The first `limit` bytes of the prompt in a canonical form: roles and texts of a chat, or the text or token ids of a completion."""
    messages = body.get("messages")
    if isinstance(messages, list):
        taken: list[str] = []
        left = limit
        for piece in _pieces(messages):
            taken.append(piece[:left])
            left -= len(taken[-1])
            if left <= 0:
                break
        return "".join(taken).encode()[:limit]
    prompt = body.get("prompt")
    return (prompt[:limit].encode() if isinstance(prompt, str) else orjson.dumps(prompt))[:limit]


def _pieces(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        if not isinstance(message, dict):
            continue
        yield f"\x1e{message.get('role')}\x1f"  # separators that text does not hold: "ab"+"c" differs from "a"+"bc"
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
