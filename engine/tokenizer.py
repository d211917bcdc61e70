"""A thin wrapper round a transformers tokenizer: what the engine and its callers need of it, and nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_UNFINISHED = "\ufffd"
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for the 256 bytes (GPT-2): printable ones for themselves, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """Renders, encodes and decodes. `hf` is a `PreTrainedTokenizerBase`."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self._bytes: dict[int, bytes] = {}

    @property
    def chat_template(self) -> str | None:
        """The template's source; the one called `default` where there are several."""
        template = getattr(self.hf, "chat_template", None)
        return template.get("default") if isinstance(template, dict) else template

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_arguments: Any) -> str:
        """The prompt text of a conversation, up to where the assistant's answer begins. Raises ValueError without a chat template."""
        if not getattr(self.hf, "chat_template", None):
            raise ValueError("this model has no chat template, so it serves completions only")
        return str(self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **template_arguments))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_arguments: Any) -> tuple[int, ...]:
        """Token ids of `render_chat`; special tokens come from the template alone."""
        return self.encode_rendered(self.render_chat(messages, **template_arguments))

    def encode_rendered(self, text: str) -> tuple[int, ...]:
        """Token ids of what `render_chat` gave."""
        return tuple(self.hf.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens that the model expects round one."""
        return tuple(self.hf.encode(text))

    def encode_piece(self, text: str) -> list[int]:
        """Token ids of text in the middle of an answer: nothing is put round it."""
        return list(self.hf.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Iterable[int], *, special: bool = False) -> str:
        """Text, without special tokens unless they are asked for."""
        return str(self.hf.decode(list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters."""
        if token not in self._bytes:
            self._bytes[token] = self._bytes_of(token)
        return self._bytes[token]

    def _bytes_of(self, token: int) -> bytes:
        piece = self.hf.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # an entry of the embedding that the tokenizer has no text for
        if token in self.hf.added_tokens_decoder:
            return str(piece).encode()
        if all(character in _BYTES for character in piece) and "ByteLevel" in repr(self.hf.backend_tokenizer.decoder):
            return bytes(_BYTES[character] for character in piece)
        if _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, for who counts tokens and runs no model: unlike `AutoTokenizer`, it loads no torch.

    It is what `tokenizer.json` says, with the chat template beside it; a class that the checkpoint names is not looked for. Raises OSError
    or ValueError for a folder without a tokenizer, ImportError without transformers.
    """
    from transformers import PreTrainedTokenizerFast

    return Tokenizer(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))


class IncrementalDecoder:
    """Text of a growing answer at a cost per token that does not depend on its length.

    Only a window of recent tokens is decoded: what decoding a window with the new tokens gives beyond the window without them.
    A window that ends in the middle of a character (U+FFFD) waits for more tokens.
    """

    __slots__ = ("_decoded", "_settled", "_tokenizer", "_tokens", "text")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._settled = 0
        self._decoded = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that became certain."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._settled : self._decoded])
        after = self._tokenizer.decode(self._tokens[self._settled :])
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._settled, self._decoded = self._decoded, len(self._tokens)
        fresh = after[len(before) :]
        self.text += fresh
        return fresh
