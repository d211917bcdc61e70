"""Which prompts train, which calibrate, and which are kept to judge by: a prompt's own hash decides, on every machine alike. No torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_JUDGED, _CALIBRATED = 0, 1
"""Of ten parts: one is kept to judge by, one fits the calibration, eight train."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """domain: what reports are grouped by."""

    text: str
    domain: str = "other"


@dataclass(frozen=True, slots=True)
class Split:
    """No prompt is in two of them, and no excluded one in the first two."""

    train: tuple[Prompt, ...]
    calibrate: tuple[Prompt, ...]
    judged: tuple[Prompt, ...]


def digest(text: str) -> str:
    """Sixteen hex digits that stand for what the prompt says; white space and case do not count."""
    return hashlib.sha256(normal(text).encode()).hexdigest()[:16]


def part_of(text: str) -> int:
    """0 to 9, by the prompt's digest."""
    return part_of_digest(digest(text))


def part_of_digest(value: str) -> int:
    return int(value, 16) % 10


def may_train(part: int) -> bool:
    return part > _CALIBRATED


def may_calibrate(part: int) -> bool:
    return part == _CALIBRATED


def normal(text: str) -> str:
    return " ".join(text.casefold().split())


def split(prompts: Iterable[Prompt], benchmarks: Iterable[str] = ()) -> Split:
    """benchmarks: prompts that are only ever judged by, whatever their hash. A prompt that comes twice counts once."""
    excluded = {normal(text) for text in benchmarks}
    seen: set[str] = set()
    parts: dict[int, list[Prompt]] = {_JUDGED: [], _CALIBRATED: [], 2: []}
    for prompt in prompts:
        key = normal(prompt.text)
        if key in seen:
            continue
        seen.add(key)
        part = _JUDGED if key in excluded else part_of(prompt.text)
        parts[min(part, 2)].append(prompt)
    return Split(tuple(parts[2]), tuple(parts[_CALIBRATED]), tuple(parts[_JUDGED]))


def balanced(prompts: Iterable[Prompt], each: int) -> list[Prompt]:
    """The first `each` prompts of every domain, or all where there are fewer; the domains take turns."""
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        rows = by_domain.setdefault(prompt.domain, [])
        if len(rows) < each:
            rows.append(prompt)
    return [prompt for row in zip_longest(*by_domain.values()) for prompt in row if prompt is not None]


def spread(prompts: Iterable[Prompt], each: int) -> list[Prompt]:
    """`balanced`, but from all over the file, which may list one source after the other: in the order of their digests."""
    return balanced(sorted(prompts, key=lambda prompt: digest(prompt.text)), each)


def read_prompts(path: Path) -> list[Prompt]:
    """JSONL: lines with `prompt` and perhaps `domain`, or OpenAI batch lines, whose user messages are taken.

    Raises ValueError naming the line that is neither.
    """
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append(_prompt(line, f"{path}, line {number}"))
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found


def _prompt(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
        if isinstance(value.get("prompt"), str):
            return Prompt(value["prompt"], str(value.get("domain", "other")))
        messages = value["body"]["messages"]
        return Prompt(next(message["content"] for message in messages if message["role"] == "user"), str(value.get("domain", "other")))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f'{where}: expected {{"prompt": ..., "domain": ...}} or a batch line with messages ({error})') from error
