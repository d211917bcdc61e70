"""Text between two tokenizers."""

from __future__ import annotations

from typing import Any

_UNFINISHED = "\ufffd"
_WINDOWS = (8, 2, 0)
"""Tokens of context with which a continuation is encoded: with enough of it, boundaries fall where they fell before."""
_SETTLE = 64
_KEEP = 32


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two transformers tokenizers give every token the same number."""
    return bool(one.get_vocab() == other.get_vocab())


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """Text with special tokens, byte for byte as far as it is whole."""
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


class Translation:
    """The text of a growing token sequence in another tokenizer's tokens. Only the last part is ever translated anew."""

    def __init__(self, source: Any, other: Any) -> None:
        self._source, self._other = source, other
        self._settled = 0
        self._done: list[int] = []

    def of(self, tokens: list[int]) -> list[int] | None:
        """The other tokenizer's tokens of everything so far; None while the text ends in the middle of a character."""
        tail = tokens[self._settled :]
        text = decode(self._source, tail)
        if text.endswith(_UNFINISHED):
            return None
        if len(tail) > _SETTLE:
            head = decode(self._source, tail[:-_KEEP])
            if not head.endswith(_UNFINISHED) and text.startswith(head):
                self._done += encode(self._other, head)
                self._settled += len(tail) - _KEEP
                text = text[len(head) :]
        return self._done + encode(self._other, text)


def continuation(tokenizer: Any, tokens: list[int], text: str) -> list[int]:
    """Tokens with which `tokens` would go on to say `text`; empty where the join would have been tokenised otherwise (SLEM's string-level
    exact match, arXiv 2502.05202)."""
    for window in _WINDOWS:
        context = tokens[-window:] if window else []
        before = decode(tokenizer, context)
        whole = encode(tokenizer, before + text)
        if whole[: len(context)] == context:
            return whole[len(context) :]
    return []
