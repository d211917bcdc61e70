"""The page of request fields, service/REQUESTS.md: written from the SDK's types, our table, and what a refused value is answered with.

`python -m tests.unit.domain.request_fields` writes it anew.
"""

from __future__ import annotations

import ast
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai.types import chat
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types

from service.domain.request_body import CHAT, COMPLETIONS, ENDPOINTS, LineRejected, parse_body
from service.domain.requests.fields import Treatment

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "service" / "REQUESTS.md"
SDK: Mapping[str, tuple[type, ...]] = {
    CHAT: (chat_types.CompletionCreateParamsNonStreaming, chat_types.CompletionCreateParamsStreaming),
    COMPLETIONS: (completion_types.CompletionCreateParamsNonStreaming, completion_types.CompletionCreateParamsStreaming),
}
BASE: Mapping[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "Hello"}]},
    COMPLETIONS: {"model": "m", "prompt": "Once"},
}
_RUNNER, _BODY = "tests/unit/adapters/test_engine_runner.py", "tests/unit/domain/test_request_body.py"
_LLAMA, _EXACT = "tests/unit/engine/test_engine_on_llama.py", "tests/unit/engine/test_exactness.py"
_PENALISED = f"{_EXACT}::test_sampling_under_penalties_has_the_penalised_distribution"
_FORM = f"{_RUNNER}::test_answers_have_the_form_that_was_asked_for"
_LABEL = f"{_BODY}::test_neutral_values_and_labels_change_nothing"
_RULES = f"{_RUNNER}::test_rules_reach_the_engine"
TESTS: Mapping[str, str] = {
    "model": f"{_RUNNER}::test_an_answer_says_what_made_it",
    "messages": f"{_RUNNER}::test_a_chat_line_gets_openais_answer",
    "prompt": f"{_RUNNER}::test_several_prompts_are_answered_in_order",
    "max_tokens": f"{_RUNNER}::test_what_the_kv_cache_can_never_hold_is_a_400_and_what_fills_it_runs",
    "max_completion_tokens": f"{_BODY}::test_supported_values_arrive",
    "temperature": _PENALISED,
    "top_p": _PENALISED,
    "top_k": _PENALISED,
    "presence_penalty": _PENALISED,
    "frequency_penalty": _PENALISED,
    "repetition_penalty": f"{_LLAMA}::test_greedy_answers_under_rules_equal_generate_with_its_processors",
    "seed": f"{_LLAMA}::test_seeded_answers_do_not_depend_on_company_or_drafts",
    "stop": f"{_RUNNER}::test_scores_cover_the_text",
    "stop_token_ids": _RULES,
    "min_tokens": _RULES,
    "logit_bias": _RULES,
    "ignore_eos": "tests/unit/engine/test_stopping.py::test_ignored_end_tokens_go_on",
    "n": f"{_RUNNER}::test_samples_of_a_line_share_its_prompt_and_its_bill",
    "logprobs": f"{_LLAMA}::test_log_probabilities_are_transformers",
    "top_logprobs": f"{_LLAMA}::test_log_probabilities_are_transformers",
    "echo": f"{_RUNNER}::test_an_echoed_prompt_is_scored_without_generating",
    "response_format": _FORM,
    "guided_regex": _FORM,
    "tools": f"{_RUNNER}::test_a_required_call_is_a_call_of_one_of_the_functions",
    "tool_choice": f"{_RUNNER}::test_a_required_call_is_a_call_of_one_of_the_functions",
    "parallel_tool_calls": f"{_BODY}::test_tools_arrive_as_templates_take_them",
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key"), _LABEL),
    "prompt_cache_retention": _LABEL,
}
"""Field -> the test that shows what it does."""
ASKING: tuple[Any, ...] = (True, 7, "high", ["audio"], {"type": "content"})
"""Values that ask for something; a refused field is shown with the first one that is not its default."""


_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_SCHEMA = {"name": "n", "description": "d", "schema": {"type": "object"}, "strict": True}
_CALLED = f"{_RUNNER}::test_a_required_call_is_a_call_of_one_of_the_functions"
_MESSAGES = f"{_BODY}::test_messages_are_normalised"
_MADE_CALLS = f"{_BODY}::test_tools_arrive_as_templates_take_them"


@dataclass(frozen=True, slots=True)
class Part:
    """A type inside a chat request: where it stands, and a value of it with every field that it has, as far as they are supported."""

    place: str
    type: str
    value: Any
    test: str = ""
    """Empty: the type is refused as a whole."""


PARTS: tuple[Part, ...] = (
    Part("messages[]", "ChatCompletionDeveloperMessageParam", {"role": "developer", "content": "x", "name": "n"}, _MESSAGES),
    Part("messages[]", "ChatCompletionSystemMessageParam", {"role": "system", "content": "x", "name": "n"}, _MESSAGES),
    Part("messages[]", "ChatCompletionUserMessageParam", {"role": "user", "content": "x", "name": "n"}, _MESSAGES),
    Part(
        "messages[]",
        "ChatCompletionAssistantMessageParam",
        {"role": "assistant", "content": "x", "name": "n", "tool_calls": [_CALL]},
        _MADE_CALLS,
    ),
    Part("messages[]", "ChatCompletionToolMessageParam", {"role": "tool", "content": "x", "tool_call_id": "c1"}, _MADE_CALLS),
    Part("messages[]", "ChatCompletionFunctionMessageParam", {"role": "function", "content": "x", "name": "f"}),
    Part(
        "messages[].content[]",
        "ChatCompletionContentPartTextParam",
        {"type": "text", "text": "x", "prompt_cache_breakpoint": {}},
        _MESSAGES,
    ),
    Part("messages[].content[]", "ChatCompletionContentPartImageParam", {"type": "image_url", "image_url": {"url": "https://x/y"}}),
    Part(
        "messages[].content[]",
        "ChatCompletionContentPartInputAudioParam",
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    ),
    Part("messages[].content[]", "File", {"type": "file", "file": {"file_id": "f"}}),
    Part("response_format", "ResponseFormatText", {"type": "text"}, _LABEL),
    Part("response_format", "ResponseFormatJSONObject", {"type": "json_object"}, _FORM),
    Part("response_format", "ResponseFormatJSONSchema", {"type": "json_schema", "json_schema": _SCHEMA}, _FORM),
    Part("tools[]", "ChatCompletionFunctionToolParam", _TOOL, _CALLED),
    Part("tools[]", "ChatCompletionCustomToolParam", {"type": "custom", "custom": {"name": "f"}}),
    Part("tool_choice", "ChatCompletionNamedToolChoiceParam", {"type": "function", "function": {"name": "f"}}, _CALLED),
    Part("tool_choice", "ChatCompletionNamedToolChoiceCustomParam", {"type": "custom", "custom": {"name": "f"}}),
    Part(
        "tool_choice",
        "ChatCompletionAllowedToolChoiceParam",
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [_TOOL]}},
    ),
)


def sdk_parts() -> dict[str, dict[str, Any]]:
    """The types that messages, their parts, formats, tools and choices may have: name -> fields."""
    unions = (
        chat.ChatCompletionMessageParam,
        chat.ChatCompletionContentPartParam,
        chat_types.ResponseFormat,
        chat.ChatCompletionToolUnionParam,
        chat.ChatCompletionToolChoiceOptionParam,
    )
    found = [part for union in unions for part in typing.get_args(union) if isinstance(part, type)]
    return {part.__name__: typing.get_type_hints(part) for part in found}


def body_with(part: Part, value: Any) -> dict[str, Any]:
    """A request that holds the value at the part's place."""
    base = dict(BASE[CHAT])
    if part.place == "messages[]":
        return {**base, "messages": [*base["messages"], value]}
    if part.place == "messages[].content[]":
        return {**base, "messages": [{"role": "user", "content": [value]}]}
    if part.place == "tools[]":
        return {**base, "tools": [value]}
    return {**base, part.place: value, **({"tools": [_TOOL]} if part.place == "tool_choice" else {})}


def part_rows() -> Iterator[Row]:
    """Every such type, and every field of those that are supported. Raises where one is neither supported nor refused."""
    for part in PARTS:
        name = f"{part.place} {part.value.get('role') or part.value['type']}"
        if not part.test:
            yield Row(name, False, _refused(body_with(part, part.value)), False)
            continue
        parse_body(CHAT, body_with(part, part.value))
        yield Row(name, True, part.test, False)
        for field in sorted(sdk_parts()[part.type].keys() - part.value.keys()):
            yield Row(f"{name}: {field}", False, _refused(body_with(part, {**part.value, field: {"id": "x"}})), False)


def _refused(body: Mapping[str, Any]) -> str:
    try:
        parse_body(CHAT, body)
    except LineRejected as error:
        return error.message
    raise AssertionError(f"{body} is neither supported nor refused")


@dataclass(frozen=True, slots=True)
class Row:
    """`evidence`: a test's name, or the message that a value is answered with."""

    field: str
    supported: bool
    evidence: str
    extension: bool


def sdk_fields(endpoint: str) -> set[str]:
    return {name for params in SDK[endpoint] for name in typing.get_type_hints(params)}


def rows(endpoint: str) -> Iterator[Row]:
    """Every field of the SDK's types and of ours. Raises KeyError for a supported one without a test."""
    known = sdk_fields(endpoint)
    for name in sorted(known) + sorted(ENDPOINTS[endpoint].keys() - known):
        field = ENDPOINTS[endpoint].get(name)
        if field is not None and field.treatment is not Treatment.NEUTRAL:
            yield Row(name, True, TESTS[name], name not in known)
        else:
            yield Row(name, False, refusal(endpoint, name), name not in known)


def refusal(endpoint: str, name: str) -> str:
    """The message for a value that asks for something."""
    for value in ASKING:
        try:
            parse_body(endpoint, {**BASE[endpoint], name: value})
        except LineRejected as error:
            return error.message
    raise AssertionError(f"{name} is neither supported nor refused")


def exists(test: str) -> bool:
    """Whether `path::name` is a test function of this repository."""
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text()) if (ROOT / path).exists() else ast.Module([], [])
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def page() -> str:
    parts = [
        "# Request fields",
        "",
        "Every field of the request bodies in the `openai` SDK's types, and our own (marked *ours*; with the SDK: `extra_body`).",
        "A supported field names a test that shows it. A refused one is answered with a 400 for its line, as shown; null, and the",
        "values that the message allows, are accepted and change nothing. Fields that are not here are refused as unknown.",
        "Written by `python -m tests.unit.domain.request_fields`, and compared with the SDK by a test.",
    ]
    for endpoint in ENDPOINTS:
        parts += ["", f"## {endpoint}", "", "| field | | test or message |", "|---|---|---|"]
        for row in rows(endpoint):
            evidence = f"`{row.evidence}`" if row.supported else row.evidence.replace("|", "\\|")
            name = f"`{row.field}`{' *ours*' if row.extension else ''}"
            parts.append(f"| {name} | {'supported' if row.supported else 'refused'} | {evidence} |")
    parts += ["", "## Inside a chat request", "", "| type or field | | test or message |", "|---|---|---|"]
    for row in part_rows():
        evidence = f"`{row.evidence}`" if row.supported else row.evidence.replace("|", "\\|")
        parts.append(f"| `{row.field}` | {'supported' if row.supported else 'refused'} | {evidence} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
