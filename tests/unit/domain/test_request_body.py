"""Request bodies: every field of the SDK's types has a row, and no value is ignored in silence."""

import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types

from service.domain.request_body import CHAT, COMPLETIONS, ENDPOINTS, GenerationRequest, LineRejected, Message, parse_body
from service.domain.requests.fields import Treatment
from service.domain.requests.formats import AnswerFormat, FormatKind

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return parse_body(CHAT, {"model": "m", "messages": HELLO, **fields})


def completion(**fields):
    return parse_body(COMPLETIONS, {"model": "m", "prompt": "Once", **fields})


def rejection(parse, **fields):
    with pytest.raises(LineRejected) as caught:
        parse(**fields)
    error = caught.value.body["error"]
    assert caught.value.status == 400
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("endpoint", "types"), [(CHAT, chat_types.CompletionCreateParamsBase), (COMPLETIONS, completion_types.CompletionCreateParamsBase)]
)
def test_every_field_of_the_sdk_has_a_row(endpoint, types):
    assert typing.get_type_hints(types).keys() - ENDPOINTS[endpoint].keys() == set()
    assert "stream" in ENDPOINTS[endpoint]  # declared apart from the base in the SDK


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_supported_field_reaches_the_request(endpoint):
    attributes = {field.attribute for field in ENDPOINTS[endpoint].values() if field.treatment is Treatment.SUPPORTED}
    assert attributes <= set(GenerationRequest.__dataclass_fields__)
    assert all(field.attribute is None for field in ENDPOINTS[endpoint].values() if field.treatment is not Treatment.SUPPORTED)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_unsupported_field_refuses_a_value_that_asks_for_something(endpoint):
    neutral = [name for name, field in ENDPOINTS[endpoint].items() if field.treatment is Treatment.NEUTRAL]
    parse = chat if endpoint == CHAT else completion
    assert neutral
    for name in neutral:
        for value in ("something", 7, {"a": 1}, ["a"]):
            error = rejection(parse, **{name: value})
            assert error["param"] == name
            assert "Allowed:" in error["message"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_null_means_absent_for_optional_fields_only(endpoint):
    parse = chat if endpoint == CHAT else completion
    for name, field in ENDPOINTS[endpoint].items():
        if field.required:
            assert rejection(parse, **{name: None})["param"] == name
        else:
            assert parse(**{name: None}) == parse()


def test_defaults_are_openais():
    assert chat() == GenerationRequest(CHAT, "m", messages=(Message("user", "Hello"),), temperature=1.0, top_p=1.0, max_tokens=None)
    assert completion() == GenerationRequest(COMPLETIONS, "m", prompts=("Once",), max_tokens=16)


def test_supported_values_arrive():
    request = chat(max_completion_tokens=9, temperature=0, top_p=0.5, top_k=40, seed=-3, stop=["\n", "END"])
    assert request == GenerationRequest(
        CHAT, "m", (Message("user", "Hello"),), max_tokens=9, temperature=0.0, top_p=0.5, top_k=40, seed=-3, stop=("\n", "END")
    )
    assert chat(stop="END").stop == ("END",)
    assert chat(top_k=-1).top_k == 0


def test_top_p_zero_is_greedy():
    request = chat(top_p=0, temperature=1.5)
    assert (request.temperature, request.top_p) == (0.0, 1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "stream": False, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "repetition_penalty": 1.0},
        {"logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
        {"user": "u", "metadata": {"k": "v"}, "safety_identifier": "s", "prompt_cache_key": "p", "prompt_cache_retention": "24h"},
        {"store": False, "service_tier": "auto", "modalities": ["text"]},
    ],
)
def test_neutral_values_and_labels_change_nothing(fields):
    assert chat(**fields) == chat()


@pytest.mark.parametrize(
    ("fields", "code", "fragments"),
    [
        ({"max_tokens": -5}, "integer_below_min_value", ["-5", "from 1 to 2147483647"]),
        ({"max_tokens": 0}, "integer_below_min_value", ["0", "from 1"]),
        ({"max_tokens": 10**12}, "integer_above_max_value", ["1000000000000", "2147483647"]),
        ({"max_tokens": 12.0}, "invalid_type", ["12.0", "integer"]),
        ({"max_tokens": True}, "invalid_type", ["true", "integer"]),
        ({"temperature": 2.5}, "decimal_above_max_value", ["2.5", "from 0 to 2"]),
        ({"temperature": "hot"}, "invalid_type", ['"hot"', "from 0 to 2"]),
        ({"top_p": -0.1}, "decimal_below_min_value", ["-0.1", "from 0 to 1"]),
        ({"top_k": -2}, "integer_below_min_value", ["-2", "from -1"]),
        ({"seed": 2**63}, "integer_above_max_value", ["9223372036854775808"]),
        ({"seed": 1.5}, "invalid_type", ["1.5"]),
        ({"n": 10**9}, "integer_above_max_value", ["1000000000", "from 1 to 128"]),
        ({"n": True}, "invalid_type", ["true", "from 1 to 128"]),
        ({"presence_penalty": 2.1}, "decimal_above_max_value", ["2.1", "from -2 to 2"]),
        ({"frequency_penalty": -3}, "decimal_below_min_value", ["-3", "from -2 to 2"]),
        ({"repetition_penalty": 0}, "decimal_below_min_value", ["0", "from 0.01 to 10"]),
        ({"min_tokens": -1}, "integer_below_min_value", ["-1", "from 0"]),
        ({"min_tokens": 9, "max_tokens": 8}, "invalid_value", ["9", "max_tokens", "8"]),
        ({"stop_token_ids": [1, "a"]}, "invalid_type", ['"a"', "token id"]),
        ({"stop_token_ids": [1] * 65}, "array_above_max_length", ["65", "at most 64"]),
        ({"ignore_eos": 1}, "invalid_type", ["1", "true or false"]),
        ({"logprobs": 3}, "invalid_type", ["3", "true or false"]),
        ({"top_logprobs": 5}, "invalid_value", ["needs 'logprobs' true"]),
        ({"top_logprobs": 21, "logprobs": True}, "integer_above_max_value", ["21", "from 0 to 20"]),
        ({"guided_regex": "a+", "response_format": {"type": "json_object"}}, "invalid_value", ["response_format"]),
        ({"stream": True}, "unsupported_value", ["true", "Allowed: false"]),
        ({"stop": ["a", "b", "c", "d", "e"]}, "array_above_max_length", ["5", "at most 4"]),
        ({"stop": [""]}, "empty_string", ["at least 1 character"]),
        ({"stop": 5}, "invalid_type", ["5"]),
        ({"metadata": {"k": 1}}, "invalid_type", ["string values"]),
        ({"user": "u" * 513}, "string_above_max_length", ["513", "512"]),
        ({"temprature": 1}, "unknown_parameter", ["temprature"]),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "invalid_value", ["max_completion_tokens"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(fields, code, fragments):
    error = rejection(chat, **fields)
    assert error["code"] == code
    assert error["param"].partition("[")[0] == next(iter(fields))
    assert all(fragment in error["message"] for fragment in fragments), error["message"]


def test_required_fields_are_asked_for():
    with pytest.raises(LineRejected, match="Missing required parameter: 'messages'"):
        parse_body(CHAT, {"model": "m"})
    with pytest.raises(LineRejected, match="Missing required parameter: 'prompt'"):
        parse_body(COMPLETIONS, {"model": "m"})
    with pytest.raises(LineRejected, match="/v1/embeddings is not supported"):
        parse_body("/v1/embeddings", {"model": "m", "input": "x"})


def test_messages_are_normalised():
    request = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
            {"role": "assistant", "content": "Yes?", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "user", "content": "Hi", "name": "ann"},
        ]
    )
    assert request.template_input == [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Hi", "name": "ann"},
    ]


@pytest.mark.parametrize(
    ("messages", "param", "fragment"),
    [
        ("hello", "messages", "an array of messages"),
        ([], "messages", "at least 1 message"),
        (["hello"], "messages[0]", "an object"),
        ([{"role": "robot", "content": "x"}], "messages[0].role", "system, developer, user, assistant, tool"),
        ([{"content": "x"}], "messages[0].role", "null"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id", "id of the call"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls", "not supported"),
        ([{"role": "user"}], "messages[0].content", "a string or a non-empty array"),
        ([{"role": "user", "content": []}], "messages[0].content", "non-empty"),
        (
            [*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[1].content[0].type",
            "text only",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "a string"),
        ([{"role": "user", "content": "x", "weight": 0}], "messages[0].weight", "Unknown parameter"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0]", "a call"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}]}],
            "messages[0].tool_calls[0].function.arguments",
            "JSON text of an object",
        ),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name", "1 to 64"),
    ],
)
def test_a_bad_message_is_named(messages, param, fragment):
    error = rejection(chat, messages=messages)
    assert error["param"] == param
    assert fragment in error["message"]


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [("Hi", ("Hi",)), ([1, 2], ((1, 2),)), (["Hi", "Ho"], ("Hi", "Ho")), ([[1, 2], [3]], ((1, 2), (3,))), (["Hi", [3]], ("Hi", (3,)))],
)
def test_prompts(prompt, parsed):
    assert completion(prompt=prompt).prompts == parsed


@pytest.mark.parametrize(
    ("prompt", "fragment"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, -1], "-1"),
        ([1, True], "true"),
        ([1, "a"], '"a"'),
        (5, "5"),
        ([[]], "empty"),
        (["a"] * 129, "129"),
    ],
)
def test_bad_prompts(prompt, fragment):
    assert fragment in rejection(completion, prompt=prompt)["message"]


def test_a_message_never_grows_with_the_value():
    for value in ("x" * 10**6, ["x" * 1000] * 1000, {"k" * 1000: "v"}):
        assert len(rejection(chat, temperature=value)["message"]) < 400
        assert len(rejection(chat, response_format=value)["message"]) < 400
    assert len(rejection(chat, **{"y" * 10**6: 1})["message"]) < 400


KEYS = [
    "role",
    "content",
    "type",
    "text",
    "name",
    "user",
    "refusal",
    "function",
    "json_schema",
    "schema",
    "strict",
    "arguments",
    "tool_calls",
]
KEYS += ["tool_call_id", "id", "parameters", "description", "5", "17"]
WORDS = ["function", "json_schema", "json_object", "text", "assistant", "tool", "user", "required", "none", "f", "{}", "[ab]+", "24h"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.integers(0, 130)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(sorted(ENDPOINTS)), st.data())
def test_any_body_is_parsed_or_refused_by_name(endpoint, data):
    names = [*ENDPOINTS[endpoint], "unknown"]
    base = {"model": "m", "messages": HELLO} if endpoint == CHAT else {"model": "m", "prompt": "Once"}
    body = {**base, **data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))}
    try:
        request = parse_body(endpoint, body)
    except LineRejected as error:
        request, refused = None, error.param
    if request is None:
        assert refused.partition("[")[0].partition(".")[0] in body
        return
    assert request.temperature >= 0
    assert 0 < request.top_p <= 1
    assert request.top_k >= 0
    assert request.max_tokens is None or request.max_tokens >= (0 if request.echo else 1)
    assert (request.messages is None) != (not request.prompts)
    assert 1 <= request.choices <= 128


def test_fields_for_scores_samples_and_rules_arrive():
    request = chat(logprobs=True, top_logprobs=4, n=3, logit_bias={"5": -100, "17": 2.5}, min_tokens=2, stop_token_ids=[7], ignore_eos=True)
    assert (request.logprobs, request.n, request.min_tokens, request.stop_token_ids, request.ignore_eos) == (4, 3, 2, (7,), True)
    assert request.logit_bias == ((5, -100.0), (17, 2.5))
    assert (chat(top_logprobs=4, logprobs=True).logprobs, chat(logprobs=True).logprobs, chat().logprobs) == (4, 0, None)
    penalties = {"presence_penalty": -1.5, "frequency_penalty": 2, "repetition_penalty": 1.1}
    assert completion(**penalties) == GenerationRequest(COMPLETIONS, "m", prompts=("Once",), max_tokens=16, **penalties)
    scored = completion(prompt=["a", [1, 2]], echo=True, logprobs=5, max_tokens=0, n=2)
    assert (scored.echo, scored.logprobs, scored.max_tokens, scored.choices) == (True, 5, 0, 4)


@pytest.mark.parametrize(
    ("parse", "fields", "param"),
    [
        (completion, {"max_tokens": 0}, "max_tokens"),
        (completion, {"logprobs": 6}, "logprobs"),
        (completion, {"prompt": ["a"] * 65, "n": 2}, "n"),
        (completion, {"suffix": "end"}, "suffix"),
        (completion, {"best_of": 2}, "best_of"),
        (chat, {"logit_bias": {"x": 1}}, "logit_bias"),
        (chat, {"logit_bias": {"05": 1}}, "logit_bias"),
        (chat, {"logit_bias": {"0000000000000017": 1}}, "logit_bias"),
        (chat, {"logit_bias": {"²": 1}}, "logit_bias"),
        (chat, {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (chat, {"logit_bias": {str(n): 0 for n in range(1025)}}, "logit_bias"),
    ],
)
def test_what_is_out_of_range_is_named(parse, fields, param):
    assert rejection(parse, **fields)["param"] == param


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


def test_strict_arguments_need_a_call_that_is_asked_for():
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    for choice in ({}, {"tool_choice": "auto"}):
        assert (
            rejection(chat, tools=[TOOL, {**strict, "function": {**strict["function"], "name": "g"}}], **choice)["param"]
            == "tools[1].function.strict"
        )
    assert chat(tools=[strict], tool_choice="required").template_tools == chat(tools=[TOOL]).template_tools
    assert chat(tools=[strict], tool_choice="none").template_tools is None


def test_tools_arrive_as_templates_take_them():
    request = chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}, parallel_tool_calls=False)
    assert request.template_tools == [{"type": "function", "function": {**TOOL["function"], "description": ""}}]
    assert (request.tool_choice, request.parallel_tool_calls) == ({"name": "weather"}, False)
    assert chat(tools=[TOOL], tool_choice="none").template_tools is None
    assert any("city" in text for text in request.prompt_texts)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    turns = chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "sun", "tool_call_id": "c1"}])
    assert turns.template_input[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{**call, "function": {"name": "weather", "arguments": {"city": "Bern"}}}]},
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": 5}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "more": 1}}]}, "tools[0].function.more"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
def test_bad_tools_are_named(fields, param):
    assert rejection(chat, **fields)["param"] == param


def test_formats_arrive():
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    wanted = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}).answer_format
    assert (wanted.kind, json.loads(wanted.text), wanted.param) == (FormatKind.JSON_SCHEMA, schema, "response_format.json_schema.schema")
    assert chat(response_format={"type": "json_object"}).answer_format == AnswerFormat(FormatKind.JSON, "", "response_format")
    assert completion(guided_regex="[a-z]+").answer_format == AnswerFormat(FormatKind.REGEX, "[a-z]+", "guided_regex")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "more": 1}}, "response_format.more"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": ""}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}}, "response_format.json_schema.schema"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 65_537}, "guided_regex"),
    ],
)
def test_bad_formats_are_named(fields, param):
    assert rejection(chat, **fields)["param"] == param
