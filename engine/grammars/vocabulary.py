"""The model's tokens as the bytes that they add to a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens[t]`: the bytes of token t, none for those that are never part of a text. `ends`: what ends an answer."""

    tokens: tuple[bytes, ...]
    ends: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Tokenizer, size: int, ends: tuple[int, ...]) -> Vocabulary:
        """size: rows of the model's output, of which the last may have no token."""
        special = {token for token, added in tokenizer.hf.added_tokens_decoder.items() if added.special} | set(tokenizer.hf.all_special_ids)
        left_out = special | set(ends)
        return Vocabulary(tuple(b"" if token in left_out else tokenizer.token_bytes(token) for token in range(size)), ends)
