"""A line's prompts as the model gets them: rendered by its chat template, encoded by its tokenizer. Workers run what this gives, and
estimates count it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.domain.request_body import GenerationRequest, LineRejected


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a line. `text`: as rendered, for chats."""

    tokens: tuple[int, ...]
    text: str = ""


class Tokenizer(Protocol):
    """What is needed of `engine.tokenizer.Tokenizer`."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **template_arguments: Any) -> str: ...

    def encode_rendered(self, text: str) -> tuple[int, ...]: ...

    def encode(self, text: str) -> tuple[int, ...]: ...


def encode_prompts(tokenizer: Tokenizer, asked: GenerationRequest) -> tuple[Prompt, ...]:
    """Raises LineRejected where the model has no chat template, or one that refuses these messages."""
    if asked.messages is None:
        return tuple(Prompt(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in asked.prompts)
    try:
        text = tokenizer.render_chat(asked.template_input, tools=asked.template_tools)
    except Exception as error:  # noqa: BLE001 - a chat template is a program that came with the model; it may raise anything
        raise LineRejected(f"The model's chat template refuses these messages: {error}", param="messages", code="invalid_value") from None
    return (Prompt(tokenizer.encode_rendered(text), text),)
