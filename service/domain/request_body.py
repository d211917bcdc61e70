"""The body of a line as a typed request. Pure: no model, tokenizer or settings are needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.requests.checks import LineRejected, error_body, show
from service.domain.requests.fields import CHAT_FIELDS, COMPLETION_FIELDS, MAX_CHOICES, Field
from service.domain.requests.formats import AnswerFormat
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
    """What a line asks for. Exactly one of `messages` and `prompts` is set.

    `model` is the name as the user wrote it. `max_tokens=None` means: as many as the context leaves; 0 only scores the prompt.
    `temperature == 0` is greedy, `top_p == 1` and `top_k == 0` are off. `logprobs`: None, or how many tokens to name beside each.
    `tool_choice`: `none`, `auto`, `required` or `{"name": ...}`.
    """

    endpoint: str
    model: str
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    echo: bool = False
    answer_format: AnswerFormat | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True

    @property
    def must_call(self) -> bool:
        """The answer has to be a call of a function."""
        return self.tool_choice not in ("none", "auto")

    @property
    def template_input(self) -> list[dict[str, Any]]:
        """The messages in the form `apply_chat_template` takes."""
        return [message.as_template_input() for message in self.messages or ()]

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools in that form; None where none may be called."""
        return None if self.tool_choice == "none" or not self.tools else [dict(tool) for tool in self.tools]

    @property
    def choices(self) -> int:
        """Answers to generate."""
        return self.n * max(len(self.prompts), 1)

    @property
    def prompt_texts(self) -> list[str]:
        """Every text that goes into the prompt, token ids aside."""
        texts = [prompt for prompt in self.prompts if isinstance(prompt, str)]
        for turn in self.template_input:
            texts += [part if isinstance(part, str) else json.dumps(part) for part in turn.values()]
        return texts + [json.dumps(tool) for tool in self.template_tools or ()]


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
    _refuse_contradictions(endpoint, body)
    values: dict[str, Any] = {"max_tokens": COMPLETIONS_MAX_TOKENS} if endpoint == COMPLETIONS else {}
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            raise LineRejected(f"Unknown parameter: '{name[:64]}'.", param=name[:64], code="unknown_parameter")
        if value is None and not field.required:
            continue
        checked = field.check(name, value)
        if field.attribute is not None and not (name == "logprobs" and field.attribute in values):  # top_logprobs says more
            values[field.attribute] = checked
    if endpoint == CHAT and body.get("logprobs") is not True:
        values.pop("logprobs", None)  # `top_logprobs` alone asks for nothing
    if values.get("top_p") == 0.0:
        # The smallest set that holds no probability is, by OpenAI's reading, the most likely token alone: greedy.
        values.update(top_p=1.0, temperature=0.0)
    request = GenerationRequest(endpoint=endpoint, **values)
    _check_together(request)
    if request.template_tools and not request.must_call:
        _refuse_strict(body["tools"])
    return request


def _refuse_missing(table: Mapping[str, Field], body: Mapping[str, Any]) -> None:
    for name, field in table.items():
        if field.required and name not in body:
            raise LineRejected(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def _refuse_contradictions(endpoint: str, body: Mapping[str, Any]) -> None:
    def given(name: str) -> bool:
        return body.get(name) is not None

    if given("max_tokens") and given("max_completion_tokens") and endpoint == CHAT:
        raise LineRejected(
            "'max_tokens' and 'max_completion_tokens' are the same limit; send one of them.", param="max_tokens", code="invalid_value"
        )
    if endpoint == CHAT and body.get("top_logprobs") and body.get("logprobs") is not True:
        raise LineRejected("'top_logprobs' needs 'logprobs' true.", param="top_logprobs", code="invalid_value")
    if given("guided_regex") and given("response_format") and body["response_format"] != {"type": "text"}:
        raise LineRejected(
            "'guided_regex' and 'response_format' both say what the answer looks like; send one of them.",
            param="guided_regex",
            code="invalid_value",
        )


def _check_together(asked: GenerationRequest) -> None:
    """What depends on more than one field."""
    if asked.choices > MAX_CHOICES:
        raise LineRejected(
            f"{len(asked.prompts)} prompts with n = {asked.n} are {asked.choices} answers; a line may have at most {MAX_CHOICES}.",
            param="n" if asked.n > 1 else "prompt",
            code="invalid_value",
        )
    if asked.max_tokens == 0 and not asked.echo:
        raise LineRejected(
            "Invalid 'max_tokens': 0 is allowed only with 'echo' true; else integers from 1.",
            param="max_tokens",
            code="integer_below_min_value",
        )
    if asked.max_tokens is not None and asked.min_tokens > asked.max_tokens:
        raise LineRejected(
            f"Invalid 'min_tokens': {asked.min_tokens} is more than max_tokens, which is {asked.max_tokens}.",
            param="min_tokens",
            code="invalid_value",
        )
    _check_tools(asked)
    form = asked.answer_format.param if asked.answer_format is not None else "tool_choice" if asked.must_call else None
    if form is not None and (asked.ignore_eos or asked.min_tokens):
        other = "ignore_eos" if asked.ignore_eos else "min_tokens"
        raise LineRejected(f"'{form}' says where the answer ends, so '{other}' cannot be used with it.", param=other, code="invalid_value")


def _refuse_strict(tools: Sequence[Mapping[str, Any]]) -> None:
    """A call that the model makes of its own accord is not held to a schema."""
    for index, tool in enumerate(tools):
        if tool["function"].get("strict"):
            raise LineRejected(
                f"'tools[{index}].function.strict' true needs a 'tool_choice' that asks for a call: \"required\" or a named function. "
                "Otherwise allowed: false, null.",
                param=f"tools[{index}].function.strict",
                code="unsupported_value",
            )


def _check_tools(asked: GenerationRequest) -> None:
    choice = asked.tool_choice
    if not asked.must_call:
        return
    names = [tool["function"]["name"] for tool in asked.tools]
    if not names:
        raise LineRejected("'tool_choice' asks for a call, and there are no 'tools'.", param="tool_choice", code="invalid_value")
    if isinstance(choice, Mapping) and choice["name"] not in names:
        raise LineRejected(
            f"'tool_choice' names {show(choice['name'])}; the tools are {', '.join(names[:20])}.", param="tool_choice", code="invalid_value"
        )
    if asked.answer_format is not None:
        raise LineRejected(
            f"'{asked.answer_format.param}' says what the answer looks like, and 'tool_choice' asks for a call instead; send one of them.",
            param="tool_choice",
            code="invalid_value",
        )
