"""Calls of functions in the text of an answer, in the ways that open models write them. Which one, their chat template shows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ToolStyle(StrEnum):
    HERMES = "hermes"
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times: Hermes, Qwen, SmolLM3."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}` for each call."""
    LLAMA = "llama"
    """The answer is `{"name": ..., "parameters": {...}}`, after `<|python_tag|>` or not; several are divided by `;`."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments`: JSON text of an object, as the model wrote it."""

    name: str
    arguments: str


def tool_style(template: str | None) -> ToolStyle | None:
    """How a model with this chat template writes its calls; None where the template does not know tools."""
    if not template or "tools" not in template:
        return None
    if "<tool_call>" in template:
        return ToolStyle.HERMES
    if "[TOOL_CALLS]" in template:
        return ToolStyle.MISTRAL
    if "<|python_tag|>" in template or '"parameters"' in template:
        return ToolStyle.LLAMA
    return None


def parse_calls(style: ToolStyle, text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """(what is left as the message's text, the calls). `text` still has its special tokens. A call that is not valid stays text."""
    return {ToolStyle.HERMES: _hermes, ToolStyle.MISTRAL: _mistral, ToolStyle.LLAMA: _llama}[style](text)


def call_forms(style: ToolStyle, tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """An answer that is one call: for each function that `choice` allows, `{"before", "schema", "after"}` round its arguments.

    None for a style whose mark is a special token, which is no text.
    """
    if style is ToolStyle.MISTRAL:
        return None
    key, start, end = ("arguments", "<tool_call>\n", "\n</tool_call>") if style is ToolStyle.HERMES else ("parameters", "", "")
    functions = [tool["function"] for tool in tools]
    if not isinstance(choice, str):
        functions = [function for function in functions if function["name"] == choice["name"]]
    return [
        {"before": f'{start}{{"name": "{function["name"]}", "{key}": ', "schema": _of_object(function["parameters"]), "after": f"}}{end}"}
        for function in functions
    ]


def _of_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments are an object, whether the schema says so or not."""
    return schema if schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"} else {"type": "object", **schema}


def call_id(style: ToolStyle, completion_id: str, choice: int, index: int) -> str:
    """The same however often the line is run. Mistral's templates take nine letters and digits, and nothing else, when it comes back."""
    digest = hashlib.blake2b(f"{completion_id}/{choice}/{index}".encode(), digest_size=12).hexdigest()
    return digest[:9] if style is ToolStyle.MISTRAL else f"call_{digest}"


_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL_NAMED = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})(?:\[ARGS\])?\s*(?=\{)")


def _hermes(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    calls: list[ToolCall] = []
    left: list[str] = []
    end = 0
    for match in _HERMES.finditer(text):
        call = _call(_json(match[1]), "arguments")
        if call is None:
            continue
        left.append(text[end : match.start()])
        calls.append(call)
        end = match.end()
    left.append(text[end:])
    return "".join(left).strip() if calls else text, tuple(calls)


def _mistral(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    content, *parts = text.split("[TOOL_CALLS]")
    calls: list[ToolCall] = []
    for part in parts:
        items = _json(part)
        if isinstance(items, list):
            found = [_call(item, "arguments") for item in items]
        else:
            named = _MISTRAL_NAMED.match(part)
            arguments = _json(part[named.end() :]) if named else None
            found = [ToolCall(named[1], part[named.end() :].strip())] if named and isinstance(arguments, dict) else [None]
        if None in found or not found:
            return text, ()
        calls += [call for call in found if call is not None]
    return (content.strip() if calls else text), tuple(calls)


def _llama(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    body = text.replace("<|python_tag|>", "", 1).strip()
    decoder = json.JSONDecoder()
    calls: list[ToolCall] = []
    place = 0
    while place < len(body):
        try:
            value, end = decoder.raw_decode(body, place)
        except (ValueError, RecursionError):
            return text, ()
        call = _call(value, "parameters") or _call(value, "arguments")
        if call is None:
            return text, ()
        calls.append(call)
        rest = body[end:].lstrip(" ;\n")
        place = len(body) - len(rest)
    return ("" if calls else text), tuple(calls)


def _call(value: Any, key: str) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(value.get(key), dict):
        return None
    return ToolCall(value["name"], json.dumps(value[key], ensure_ascii=False))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
