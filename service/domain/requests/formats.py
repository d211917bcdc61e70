"""What an answer's text must look like: `response_format`, and our extension `guided_regex` (vLLM's name)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.domain.requests.checks import LineRejected, show, wrong_type

MAX_CHARACTERS = 65_536
"""Of a schema or pattern. What compiles is bounded besides, by time and memory."""


class FormatKind(StrEnum):
    JSON = "json"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """`text`: the schema as JSON, or the pattern; nothing for JSON alone. `param`: the field that asked for it."""

    kind: FormatKind
    text: str
    param: str


def parse_response_format(param: str, value: Any) -> AnswerFormat | None:
    """OpenAI's `text`, `json_object` and `json_schema`. None: free text."""
    if not isinstance(value, dict):
        raise wrong_type(param, 'an object such as {"type": "json_object"}', value)
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise LineRejected(
            f'\'{param}.type\' {show(kind)} is not supported. Allowed: "text", "json_object", "json_schema".',
            param=f"{param}.type",
            code="unsupported_value",
        )
    _refuse_others(param, value, {"type", "json_schema"} if kind == "json_schema" else {"type"})
    if kind == "text":
        return None
    if kind == "json_object":
        return AnswerFormat(FormatKind.JSON, "", param)
    described = value.get("json_schema")
    if not isinstance(described, dict):
        raise wrong_type(f"{param}.json_schema", 'an object {"name": "...", "schema": {...}}', described)
    _refuse_others(f"{param}.json_schema", described, {"name", "description", "schema", "strict"})
    if not isinstance(described.get("name"), str) or not 1 <= len(described["name"]) <= 64:
        raise wrong_type(f"{param}.json_schema.name", "a string of 1 to 64 characters", described.get("name"))
    schema = described.get("schema")
    if schema is None:
        return AnswerFormat(FormatKind.JSON, "", param)
    if not isinstance(schema, dict):
        raise wrong_type(f"{param}.json_schema.schema", "a JSON schema (an object)", schema)
    text = json.dumps(schema, ensure_ascii=False)  # keys in the user's order: it is the order of the answer's
    return AnswerFormat(FormatKind.JSON_SCHEMA, _bounded(f"{param}.json_schema.schema", text), f"{param}.json_schema.schema")


def parse_regex(param: str, value: Any) -> AnswerFormat:
    """A pattern that the whole answer matches."""
    if not isinstance(value, str) or not value:
        raise wrong_type(param, "a regular expression", value)
    return AnswerFormat(FormatKind.REGEX, _bounded(param, value), param)


def _bounded(param: str, text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise LineRejected(
            f"Invalid '{param}': {len(text)} characters, at most {MAX_CHARACTERS} are allowed.",
            param=param,
            code="string_above_max_length",
        )
    return text


def _refuse_others(param: str, value: dict[str, Any], known: set[str]) -> None:
    for name in value.keys() - known:
        raise LineRejected(f"Unknown parameter: '{param}.{name[:64]}'.", param=f"{param}.{name[:64]}", code="unknown_parameter")
