"""The `tools` of a chat request, and `tool_choice`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from service.domain.requests.checks import LineRejected, show, wrong_type

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FUNCTION = frozenset({"name", "description", "parameters", "strict"})


def parse_tools(param: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Function tools, as chat templates take them: `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    if not isinstance(value, list):
        raise wrong_type(param, "an array of tools", value)
    if len(value) > MAX_TOOLS:
        raise LineRejected(
            f"Invalid '{param}': {len(value)} tools, at most {MAX_TOOLS} are allowed.", param=param, code="array_above_max_length"
        )
    tools = tuple(_tool(f"{param}[{index}]", item) for index, item in enumerate(value))
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LineRejected(f"Invalid '{param}': two functions are named {show(twice)}.", param=param, code="invalid_value")
    return tools


def parse_tool_choice(param: str, value: Any) -> str | Mapping[str, Any]:
    """`none`, `auto`, `required`, or the name of the one function that must be called as `{"name": ...}`."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict):
        return {"name": _name(f"{param}.function.name", value["function"].get("name"))}
    raise LineRejected(
        f'\'{param}\' {show(value)} is not supported. Allowed: "none", "auto", "required", '
        '{"type": "function", "function": {"name": "..."}}, null.',
        param=param,
        code="unsupported_value",
    )


def _tool(param: str, item: Any) -> Mapping[str, Any]:
    if not isinstance(item, dict) or item.get("type") != "function" or not isinstance(item.get("function"), dict):
        raise wrong_type(param, 'a function tool, {"type": "function", "function": {"name": "..."}}', item)
    for name in item.keys() - {"type", "function"}:
        raise LineRejected(f"Unknown parameter: '{param}.{name[:64]}'.", param=f"{param}.{name[:64]}", code="unknown_parameter")
    function = item["function"]
    for name in function.keys() - _FUNCTION:
        raise LineRejected(
            f"Unknown parameter: '{param}.function.{name[:64]}'.", param=f"{param}.function.{name[:64]}", code="unknown_parameter"
        )
    made: dict[str, Any] = {"name": _name(f"{param}.function.name", function.get("name"))}
    description, parameters, strict = function.get("description"), function.get("parameters"), function.get("strict")
    if description is not None and not isinstance(description, str):
        raise wrong_type(f"{param}.function.description", "a string", description)
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong_type(f"{param}.function.parameters", "a JSON schema", parameters)
    if strict is not None and not isinstance(strict, bool):
        raise wrong_type(f"{param}.function.strict", "true or false", strict)
    made["description"] = description or ""
    made["parameters"] = parameters if parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": made}


def _name(param: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise wrong_type(param, "a name of 1 to 64 letters, digits, underscores and dashes", value)
    return value
