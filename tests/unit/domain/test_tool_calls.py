"""Calls in the ways that models write them, and thinking before an answer."""

import json

import pytest

from service.domain.reasoning import Thoughts, count_thinking, split_thoughts, thinks
from service.domain.tool_calls import ToolCall, ToolStyle, call_id, parse_calls, tool_style


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (None, None),
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{{ tools }}", ToolStyle.HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", ToolStyle.MISTRAL),
        ("{% if tools %}{{ tools }}<|python_tag|>", ToolStyle.LLAMA),
        ("{% if tools %}{{ tools }}", None),
    ],
)
def test_the_template_shows_the_style(template, style):
    assert tool_style(template) is style


BERN, ROME = ToolCall("weather", '{"city": "Bern"}'), ToolCall("weather", '{"city": "Rome"}')
WRITTEN = '{"name": "weather", "arguments": {"city": "Bern"}}'
OTHER = '{"name": "weather", "arguments": {"city": "Rome"}}'


@pytest.mark.parametrize(
    ("style", "text", "left", "calls"),
    [
        (ToolStyle.HERMES, f"<tool_call>\n{WRITTEN}\n</tool_call>", "", (BERN,)),
        (ToolStyle.HERMES, f"Wait.\n<tool_call>{WRITTEN}</tool_call>\n<tool_call>{OTHER}</tool_call>", "Wait.", (BERN, ROME)),
        (ToolStyle.HERMES, f"<tool_call>{WRITTEN}", "", (BERN,)),
        (ToolStyle.HERMES, "<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", ()),
        (
            ToolStyle.HERMES,
            '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
            '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
            (),
        ),
        (ToolStyle.MISTRAL, f"[TOOL_CALLS][{WRITTEN}, {OTHER}]", "", (BERN, ROME)),
        (ToolStyle.MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Bern"}[TOOL_CALLS]weather{"city": "Rome"}', "", (BERN, ROME)),
        (ToolStyle.MISTRAL, "[TOOL_CALLS][", "[TOOL_CALLS][", ()),
        (ToolStyle.MISTRAL, "none at all", "none at all", ()),
        (ToolStyle.LLAMA, WRITTEN.replace("arguments", "parameters"), "", (BERN,)),
        (ToolStyle.LLAMA, f"<|python_tag|>{WRITTEN}; {OTHER}", "", (BERN, ROME)),
        (ToolStyle.LLAMA, "It is sunny.", "It is sunny.", ()),
        (ToolStyle.LLAMA, f"{WRITTEN} and then", f"{WRITTEN} and then", ()),
    ],
)
def test_calls_are_read(style, text, left, calls):
    found = parse_calls(style, text)
    assert found == (left, calls)
    assert all(isinstance(json.loads(call.arguments), dict) for call in found[1])


def test_ids_repeat_and_differ():
    assert call_id(ToolStyle.HERMES, "chatcmpl-1", 0, 0) == call_id(ToolStyle.HERMES, "chatcmpl-1", 0, 0)
    assert len({call_id(ToolStyle.HERMES, "chatcmpl-1", choice, index) for choice in range(3) for index in range(3)}) == 9
    assert len(call_id(ToolStyle.MISTRAL, "chatcmpl-1", 0, 0)) == 9


@pytest.mark.parametrize(
    ("text", "prompt", "thoughts"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "", Thoughts("hm", "Yes.")),
        ("hm</think>Yes.", "user: ?<think>\n", Thoughts("hm", "Yes.")),
        ("<think>still at it", "", Thoughts("still at it", "")),
        ("Yes.", "", Thoughts("", "Yes.")),
        ("I <think> so </think>", "", Thoughts("", "I <think> so </think>")),
    ],
)
def test_thinking_is_parted_from_the_answer(text, prompt, thoughts):
    assert split_thoughts(text, prompt) == thoughts


@pytest.mark.parametrize(
    ("text", "prompt", "count"), [("<think>ab</think>cd", "", 17), ("ab</think>cd", "<think>", 10), ("abcd", "", 0), ("<think>ab", "", 9)]
)
def test_thinking_is_counted(text, prompt, count):
    assert count_thinking(len(text), lambda length: text[:length], prompt) == count
    assert [thinks(template) for template in ("{% if x %}</think>", None, "plain")] == [True, False, False]
