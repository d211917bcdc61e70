"""Every field a request body may carry, and what becomes of it. Supporting one more is a change of its row.

A field that is not in the table is refused as unknown, so nothing is ever ignored in silence. Null means absent everywhere except
in required fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.domain.requests.checks import (
    INT32_MAX,
    Check,
    LineRejected,
    integer,
    number,
    only,
    prompts,
    stop_sequences,
    string,
    string_map,
    token_biases,
    token_ids,
    wrong_type,
)
from service.domain.requests.formats import parse_regex, parse_response_format
from service.domain.requests.messages import parse_messages
from service.domain.requests.tools import parse_tool_choice, parse_tools


class Treatment(StrEnum):
    """What a field does to the answer."""

    SUPPORTED = "supported"
    NEUTRAL = "neutral"
    """Accepted with the values that ask for nothing beyond the default, refused with any other."""
    LABEL = "label"
    """Checked and accepted; it describes the request and has no effect on the answer, here or at OpenAI."""


@dataclass(frozen=True, slots=True)
class Field:
    treatment: Treatment
    check: Check
    attribute: str | None = None
    """The attribute of GenerationRequest that takes the checked value."""
    required: bool = False


def _takes(attribute: str, check: Check, *, required: bool = False) -> Field:
    return Field(Treatment.SUPPORTED, check, attribute, required)


def _neutral(*values: Any, why: str) -> Field:
    return Field(Treatment.NEUTRAL, only(*values, why=why))


def _label(check: Check) -> Field:
    return Field(Treatment.LABEL, check)


def _boolean(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(param, "true or false", value)
    return value


def _model(param: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise wrong_type(param, "the name of a model", value)
    return value


def _top_k(param: str, value: Any) -> int:
    """0 and vLLM's -1 both mean off."""
    return max(0, int(integer(-1, INT32_MAX)(param, value)))


def _chat_logprobs(param: str, value: Any) -> int | None:
    """Without `top_logprobs`: those of the tokens themselves."""
    return 0 if _boolean(param, value) else None


def _retention(param: str, value: Any) -> None:
    if value not in ("in_memory", "in-memory", "24h"):
        raise LineRejected(f'Invalid \'{param}\'. Allowed: "in_memory", "24h".', param=param, code="invalid_value")


MAX_CHOICES = 128
"""Answers to one line: prompts times `n`."""

_BATCH = "the answers of a batch are written whole"
_ONE = "one candidate is generated for an answer; ask for more answers with n"
_FUNCTIONS = "it was replaced by tools and tool_choice, which are supported"
_TEXT = "the models here read and write text only"

_SHARED: dict[str, Field] = {
    "model": _takes("model", _model, required=True),
    "temperature": _takes("temperature", number(0, 2)),
    "top_p": _takes("top_p", number(0, 1)),
    "top_k": _takes("top_k", _top_k),
    "seed": _takes("seed", integer(-(2**63), 2**63 - 1)),
    "stop": _takes("stop", stop_sequences),
    "stop_token_ids": _takes("stop_token_ids", token_ids),
    "ignore_eos": _takes("ignore_eos", _boolean),
    "n": _takes("n", integer(1, MAX_CHOICES)),
    "presence_penalty": _takes("presence_penalty", number(-2, 2)),
    "frequency_penalty": _takes("frequency_penalty", number(-2, 2)),
    "repetition_penalty": _takes("repetition_penalty", number(0.01, 10)),
    "logit_bias": _takes("logit_bias", token_biases),
    "min_tokens": _takes("min_tokens", integer(0, INT32_MAX)),
    "guided_regex": _takes("answer_format", parse_regex),
    "stream": _neutral(False, why=_BATCH),
    "stream_options": _neutral(why=_BATCH),
    "min_p": _neutral(0, why="this filter is not applied; top_p and top_k are"),
    "user": _label(string(512)),
}

CHAT_FIELDS: Mapping[str, Field] = {
    **_SHARED,
    "messages": _takes("messages", parse_messages, required=True),
    "max_tokens": _takes("max_tokens", integer(1, INT32_MAX)),
    "max_completion_tokens": _takes("max_tokens", integer(1, INT32_MAX)),
    "logprobs": _takes("logprobs", _chat_logprobs),
    "top_logprobs": _takes("logprobs", integer(0, 20)),
    "response_format": _takes("answer_format", parse_response_format),
    "tools": _takes("tools", parse_tools),
    "tool_choice": _takes("tool_choice", parse_tool_choice),
    "parallel_tool_calls": _takes("parallel_tool_calls", _boolean),
    "functions": _neutral([], why=_FUNCTIONS),
    "function_call": _neutral("none", "auto", why=_FUNCTIONS),
    "modalities": _neutral(["text"], why=_TEXT),
    "audio": _neutral(why=_TEXT),
    "prediction": _neutral(why="drafts come from the server's own drafters"),
    "reasoning_effort": _neutral("none", why="the effort of the models here cannot be set"),
    "verbosity": _neutral("medium", why="the verbosity of the models here cannot be set"),
    "web_search_options": _neutral(why="the models here do not search"),
    "moderation": _neutral(why="answers are not moderated"),
    "store": _neutral(False, why="answers are kept in the batch's output file only"),
    "service_tier": _neutral("auto", "default", why="a batch has one tier"),
    "metadata": _label(string_map),
    "safety_identifier": _label(string(512)),
    # Prefix sharing is automatic, so what asks for a cache has what it asks for.
    "prompt_cache_key": _label(string(512)),
    "prompt_cache_retention": _label(_retention),
    "prompt_cache_options": _neutral({}, {"mode": "implicit"}, why="prefixes are shared automatically"),
}

COMPLETION_FIELDS: Mapping[str, Field] = {
    **_SHARED,
    "prompt": _takes("prompts", prompts, required=True),
    "max_tokens": _takes("max_tokens", integer(0, INT32_MAX)),
    "logprobs": _takes("logprobs", integer(0, 5)),
    "echo": _takes("echo", _boolean),
    "best_of": _neutral(1, why=_ONE),
    "suffix": _neutral("", why="text is continued, not filled in"),
}
