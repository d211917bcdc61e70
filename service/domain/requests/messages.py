"""The `messages` of a chat request, as what a chat template takes: a role and one text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.domain.requests.checks import LineRejected, show, wrong_type

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""OpenAI's roles -> the template's. Chat templates of open models know `system`, which is what `developer` replaced."""

_OPTIONAL: dict[str, tuple[Any, ...]] = {
    # What an earlier answer carries when it is sent back: accepted where it says nothing.
    "refusal": (None,),
    "function_call": (None,),
    "audio": (None,),
    "annotations": (None, []),
}


_OWN = {"assistant": "tool_calls", "tool": "tool_call_id"}
"""What one role alone may carry. Elsewhere it is accepted where it says nothing."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `name` is handed to the chat template, which decides what it means."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of an earlier answer, as templates take them: arguments as an object."""
    tool_call_id: str | None = None

    def as_template_input(self) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


def parse_messages(param: str, value: Any) -> tuple[Message, ...]:
    """Checks and normalises the list. Raises LineRejected naming the message (`messages[3].content`)."""
    if not isinstance(value, list):
        raise wrong_type(param, "an array of messages", value)
    if not value:
        raise LineRejected(f"Invalid '{param}': the array is empty; at least 1 message is needed.", param=param, code="empty_array")
    return tuple(_message(f"{param}[{index}]", item) for index, item in enumerate(value))


def _message(param: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise wrong_type(param, "an object with 'role' and 'content'", item)
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise LineRejected(
            f"'{param}.role' {show(role)} is not supported. Allowed: {', '.join(ROLES)}.", param=f"{param}.role", code="unsupported_value"
        )
    for name, content in item.items():
        if name in ("role", "content", "name") or name == _OWN.get(role):
            continue
        if name not in _OPTIONAL and name not in _OWN.values():
            raise LineRejected(f"Unknown parameter: '{param}.{name}'.", param=f"{param}.{name}", code="unknown_parameter")
        if content not in _OPTIONAL.get(name, (None, [])):
            raise LineRejected(
                f"'{param}.{name}' is not supported by this server; leave it out.", param=f"{param}.{name}", code="unsupported_value"
            )
    name = item.get("name")
    if name is not None and not (isinstance(name, str) and 1 <= len(name) <= 64):
        raise wrong_type(f"{param}.name", "a string of 1 to 64 characters", name)
    calls = _calls(f"{param}.tool_calls", item["tool_calls"]) if role == "assistant" and item.get("tool_calls") else ()
    content = "" if calls and item.get("content") is None else _content(f"{param}.content", item.get("content"))
    call_id = item.get("tool_call_id")
    if role == "tool" and not (isinstance(call_id, str) and 1 <= len(call_id) <= 256):
        raise wrong_type(f"{param}.tool_call_id", "the id of the call that this answers", call_id)
    return Message(ROLES[role], content, name, calls, call_id if role == "tool" else None)


def _calls(param: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list):
        raise wrong_type(param, "an array of calls", value)
    return tuple(_call(f"{param}[{index}]", item) for index, item in enumerate(value))


def _call(param: str, item: Any) -> Mapping[str, Any]:
    function = item.get("function") if isinstance(item, dict) and item.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(item.get("id"), str) or not isinstance(function.get("name"), str):
        raise wrong_type(param, 'a call, {"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}', item)
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise wrong_type(f"{param}.function.arguments", "the JSON text of an object", function.get("arguments"))
    return {"id": item["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _content(param: str, value: Any) -> str:
    """A string, or text parts, which are joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong_type(param, "a string or a non-empty array of text parts", value)
    return "\n".join(_text_part(f"{param}[{index}]", part) for index, part in enumerate(value))


def _text_part(param: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise wrong_type(param, 'a part such as {"type": "text", "text": "..."}', part)
    kind = part.get("type")
    if kind != "text":
        raise LineRejected(
            f"'{param}.type' {show(kind)} is not supported: the models here read text only. Allowed: \"text\".",
            param=f"{param}.type",
            code="unsupported_value",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise wrong_type(f"{param}.text", "a string", text)
    # A cache breakpoint asks for what prefix sharing does anyway.
    for name in part.keys() - {"type", "text", "prompt_cache_breakpoint"}:
        raise LineRejected(f"Unknown parameter: '{param}.{name}'.", param=f"{param}.{name}", code="unknown_parameter")
    return text
