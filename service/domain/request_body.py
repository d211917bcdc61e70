"""The body of a line as a typed request. Pure: no model, tokenizer or settings are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.domain.requests.checks import LineRejected, error_body
from service.domain.requests.fields import CHAT_FIELDS, COMPLETION_FIELDS, Field
from service.domain.requests.messages import Message

__all__ = ["CHAT", "COMPLETIONS", "ENDPOINTS", "GenerationRequest", "LineRejected", "Message", "error_body", "parse_body"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDPOINTS: Mapping[str, Mapping[str, Field]] = {CHAT: CHAT_FIELDS, COMPLETIONS: COMPLETION_FIELDS}
"""The endpoints that lines may name, each with its table of fields."""

COMPLETIONS_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat has none: it goes on until the model stops or its context is full."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a line asks for. Exactly one of `messages` and `prompt` is set.

    `model` is the name as the user wrote it. `max_tokens=None` means: as many as the context leaves. `temperature == 0` is greedy,
    `top_p == 1` and `top_k == 0` are off.
    """

    endpoint: str
    model: str
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def template_input(self) -> list[dict[str, str]]:
        """The messages in the form `apply_chat_template` takes."""
        return [message.as_template_input() for message in self.messages or ()]


def parse_body(endpoint: str, body: Mapping[str, Any]) -> GenerationRequest:
    """Checks every field of `body` against the endpoint's table.

    Raises:
        LineRejected: a field is unknown, unsupported, of the wrong type or out of range; it names the field, value and range.
    """
    if endpoint not in ENDPOINTS:
        raise LineRejected(
            f"The endpoint {endpoint} is not supported. Allowed: {', '.join(ENDPOINTS)}.", param="url", code="unsupported_value"
        )
    table = ENDPOINTS[endpoint]
    _refuse_missing(table, body)
    _refuse_both_limits(body)
    values: dict[str, Any] = {"max_tokens": COMPLETIONS_MAX_TOKENS} if endpoint == COMPLETIONS else {}
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            raise LineRejected(f"Unknown parameter: '{name[:64]}'.", param=name[:64], code="unknown_parameter")
        if value is None and not field.required:
            continue
        checked = field.check(name, value)
        if field.attribute is not None:
            values[field.attribute] = checked
    if values.get("top_p") == 0.0:
        # The smallest set that holds no probability is, by OpenAI's reading, the most likely token alone: greedy.
        values.update(top_p=1.0, temperature=0.0)
    return GenerationRequest(endpoint=endpoint, **values)


def _refuse_missing(table: Mapping[str, Field], body: Mapping[str, Any]) -> None:
    for name, field in table.items():
        if field.required and name not in body:
            raise LineRejected(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def _refuse_both_limits(body: Mapping[str, Any]) -> None:
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise LineRejected(
            "'max_tokens' and 'max_completion_tokens' are the same limit; send one of them.", param="max_tokens", code="invalid_value"
        )
