"""Answers in OpenAI's shape."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.ids import request_id
from service.domain.request_body import CHAT, COMPLETIONS
from service.domain.tool_calls import ToolCall
from service.domain.usage import Usage

_ID_PREFIX = {CHAT: "chatcmpl-", COMPLETIONS: "cmpl-"}


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's text, bytes and natural log-probability (None: it has none, as the first of a prompt), and the likeliest in its place."""

    text: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. `finish_reason`: `stop`, `length` or `tool_calls`. `scores`: None where they were not asked for."""

    text: str
    finish_reason: str
    scores: Sequence[ScoredToken] | None = None
    reasoning: str | None = None
    calls: Sequence[tuple[str, ToolCall]] = ()
    """(id, call)."""


@dataclass(frozen=True, slots=True)
class Made:
    """What made an answer: everything besides the request that it depends on."""

    model: str
    revision: str
    dtype: str
    engine: str
    drafter: str

    def as_body(self) -> dict[str, str]:
        return {"model": self.model, "revision": self.revision, "dtype": self.dtype, "engine": self.engine, "drafter": self.drafter}


def completion_id(endpoint: str, batch_id: str, line_no: int) -> str:
    """The `id` of an answer: the same however often the line is run."""
    return _ID_PREFIX[endpoint] + request_id(batch_id, line_no).removeprefix("req_")


def answer_body(
    endpoint: str,
    *,
    id: str,
    created: int,
    model: str,
    choices: Sequence[Choice],
    usage: Usage,
    system_fingerprint: str,
    made: Made | None = None,
) -> dict[str, Any]:
    """A `chat.completion` or a `text_completion`. `created` is in Unix seconds; `made` goes into our extension `longdraft`."""
    chat = endpoint == CHAT
    body = {
        "id": id,
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_chat_choice(index, choice) if chat else _text_choice(index, choice) for index, choice in enumerate(choices)],
        "usage": usage_body(usage),
        "system_fingerprint": system_fingerprint,
    }
    return body if made is None else {**body, "longdraft": made.as_body()}


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage of one answer: cached tokens are part of the prompt's, reasoning tokens of the completion's."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _chat_choice(index: int, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning  # as vLLM and DeepSeek name it
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for id, call in choice.calls
        ]
    logprobs = None
    if choice.scores is not None:
        content = [{**_entry(score.text, score.logprob), "top_logprobs": [_entry(*top) for top in score.top]} for score in choice.scores]
        logprobs = {"content": content, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _entry(text: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _shown(text), "bytes": list(text), "logprob": logprob}


def _text_choice(index: int, choice: Choice) -> dict[str, Any]:
    logprobs = None if choice.scores is None else _text_logprobs(choice.scores)
    return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _text_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any]:
    """The older shape: parallel lists; `top_logprobs` always holds the token itself beside the likeliest."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    offsets, characters = [], 0
    for score in scores:
        offsets.append(characters)
        characters += len(decoder.decode(score.text))
    tops = [
        None if score.logprob is None else {_shown(text): logprob for text, logprob in (*score.top, (score.text, score.logprob))}
        for score in scores
    ]
    return {
        "tokens": [_shown(score.text) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _shown(text: bytes) -> str:
    return text.decode(errors="replace")
