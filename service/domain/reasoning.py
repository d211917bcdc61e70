"""Thinking in front of an answer, where the model's chat template marks it with <think> and </think>."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

START, END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """`reasoning` and what was said after it."""

    reasoning: str
    content: str


def thinks(template: str | None) -> bool:
    """Whether models with this chat template mark what they think."""
    return bool(template) and END in str(template)


def split_thoughts(text: str, prompt: str) -> Thoughts:
    """Parts an answer. `prompt`: its rendered prompt, which may have opened the thinking itself."""
    if prompt.rstrip().endswith(START):
        body = text
    else:
        before, mark, body = text.partition(START)
        if not mark or before.strip():
            return Thoughts("", text)
    reasoning, _, content = body.partition(END)
    return Thoughts(reasoning.strip("\n"), content.lstrip("\n"))


def count_thinking(length: int, prefix: Callable[[int], str], prompt: str) -> int:
    """How many of an answer's `length` tokens are thinking, its marks included. `prefix(n)`: the text of the first n tokens."""
    text = prefix(length)
    if not prompt.rstrip().endswith(START) and not text.lstrip().startswith(START):
        return 0
    if END not in text:
        return length
    low, high = 1, length  # the shortest prefix that holds the end mark
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if END in prefix(middle) else (middle + 1, high)
    return low
