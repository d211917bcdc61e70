"""Answers in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from service.domain.ids import request_id
from service.domain.request_body import CHAT, COMPLETIONS
from service.domain.usage import Usage

_ID_PREFIX = {CHAT: "chatcmpl-", COMPLETIONS: "cmpl-"}


def completion_id(endpoint: str, batch_id: str, line_no: int) -> str:
    """The `id` of an answer: the same however often the line is run."""
    return _ID_PREFIX[endpoint] + request_id(batch_id, line_no).removeprefix("req_")


def chat_completion_body(
    *, id: str, created: int, model: str, text: str, finish_reason: str, usage: Usage, system_fingerprint: str | None
) -> dict[str, Any]:
    """A `chat.completion` with one choice. `created` is in Unix seconds; `finish_reason` is `stop` or `length`."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
        "usage": usage_body(usage),
        "system_fingerprint": system_fingerprint,
    }


def completion_body(
    *, id: str, created: int, model: str, text: str, finish_reason: str, usage: Usage, system_fingerprint: str | None
) -> dict[str, Any]:
    """A `text_completion` with one choice. `created` is in Unix seconds; `finish_reason` is `stop` or `length`."""
    return {
        "id": id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
        "usage": usage_body(usage),
        "system_fingerprint": system_fingerprint,
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage of one answer: cached tokens are part of the prompt's, reasoning tokens of the completion's."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
