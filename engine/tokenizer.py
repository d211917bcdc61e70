"""A thin wrapper round a transformers tokenizer: what the engine and its callers need of it, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_UNFINISHED = "\ufffd"


class Tokenizer:
    """Renders, encodes and decodes. `hf` is a `PreTrainedTokenizerBase`."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_arguments: Any) -> str:
        """The prompt text of a conversation, up to where the assistant's answer begins. Raises ValueError without a chat template."""
        if not getattr(self.hf, "chat_template", None):
            raise ValueError("this model has no chat template, so it serves completions only")
        return str(self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **template_arguments))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_arguments: Any) -> tuple[int, ...]:
        """Token ids of `render_chat`; special tokens come from the template alone."""
        return tuple(self.hf.encode(self.render_chat(messages, **template_arguments), add_special_tokens=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with the special tokens that the model expects round one."""
        return tuple(self.hf.encode(text))

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text without special tokens."""
        return str(self.hf.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
