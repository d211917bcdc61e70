"""Answers validate under the SDK's own strict types, and lines of output files are stable bytes."""

import orjson
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from service.domain.line import LineOutcome, Outcome
from service.domain.request_body import CHAT, COMPLETIONS, error_body
from service.domain.response_body import Choice, Made, ScoredToken, answer_body, completion_id
from service.domain.result_lines import ResultLine, decode_result, encode_result, pack_results
from service.domain.tool_calls import ToolCall
from service.domain.usage import Usage

USAGE = Usage(input_tokens=12, cached_tokens=8, output_tokens=3, reasoning_tokens=1)


SCORES = [ScoredToken("Hö".encode(), -0.5, (("Hö".encode(), -0.5), (b"He", -1.5))), ScoredToken(b"\xe6\x97", -2.0, ((b"!", -0.1),))]
MADE = Made("smollm2-135m", "SmolLM2@1", "float32", "1.0.0", "suffix")


def body_of(endpoint, *choices, made=MADE):
    return answer_body(
        endpoint,
        id=completion_id(endpoint, "batch_1", 7),
        created=1_700_000_000,
        model="smollm2-135m",
        choices=choices,
        usage=USAGE,
        system_fingerprint="fp_1",
        made=made,
    )


@pytest.mark.parametrize(("model", "endpoint"), [(ChatCompletion, CHAT), (Completion, COMPLETIONS)])
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_bodies_validate_under_the_sdks_types(model, endpoint, finish_reason):
    body = body_of(endpoint, Choice("Höllo\u2028", finish_reason), Choice("two", "stop", SCORES))
    answer = model.model_validate(body, strict=True)
    assert answer.usage.prompt_tokens_details.cached_tokens == 8
    assert answer.usage.completion_tokens_details.reasoning_tokens == 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (12, 3, 15)
    assert [choice.finish_reason for choice in answer.choices] == [finish_reason, "stop"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert set(body) - set(model.model_fields) == {"longdraft"}
    assert body["longdraft"] == {
        "model": "smollm2-135m",
        "revision": "SmolLM2@1",
        "dtype": "float32",
        "engine": "1.0.0",
        "drafter": "suffix",
    }


def test_scores_of_a_chat_have_bytes():
    answer = ChatCompletion.model_validate(body_of(CHAT, Choice("Hö?", "length", SCORES)), strict=True)
    first, second = answer.choices[0].logprobs.content
    assert (first.token, bytes(first.bytes), first.logprob) == ("Hö", "Hö".encode(), -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("Hö", -0.5), ("He", -1.5)]
    assert (second.token, bytes(second.bytes)) == ("\ufffd", b"\xe6\x97")


def test_scores_of_a_completion_are_parallel_lists():
    logprobs = Completion.model_validate(body_of(COMPLETIONS, Choice("Hö?", "length", SCORES)), strict=True).choices[0].logprobs
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["Hö", "\ufffd"], [-0.5, -2.0], [0, 2])
    assert logprobs.top_logprobs == [{"Hö": -0.5, "He": -1.5}, {"!": -0.1, "\ufffd": -2.0}]


def test_the_first_token_of_an_echoed_prompt_has_no_score():
    """Null, as OpenAI answers, though the SDK's types promise numbers."""
    logprobs = body_of(COMPLETIONS, Choice("Say Hö?", "length", [ScoredToken(b"Say ", None), *SCORES]))["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"], logprobs["text_offset"]) == ([None, -0.5, -2.0], [0, 4, 6])
    assert logprobs["top_logprobs"][0] is None


def test_calls_and_reasoning_of_a_chat():
    call = ("call_1", ToolCall("weather", '{"city": "Bern"}'))
    answer = ChatCompletion.model_validate(body_of(CHAT, Choice("", "tool_calls", reasoning="hm", calls=[call])), strict=True)
    message = answer.choices[0].message
    assert (message.content, message.tool_calls[0].id, message.tool_calls[0].function.name) == (None, "call_1", "weather")
    assert message.tool_calls[0].function.arguments == '{"city": "Bern"}'
    assert message.reasoning_content == "hm"


def test_ids_belong_to_the_line():
    assert completion_id(CHAT, "b", 1) == completion_id(CHAT, "b", 1)
    assert (
        len({completion_id(CHAT, "b", 1), completion_id(CHAT, "b", 2), completion_id(CHAT, "c", 1), completion_id(COMPLETIONS, "b", 1)})
        == 4
    )
    assert completion_id(CHAT, "b", 1).startswith("chatcmpl-")


def outcome(line_no, **fields):
    return LineOutcome("batch_1", line_no, None, f"c{line_no}", **fields)


def test_a_success_line():
    line = encode_result(outcome(1, outcome=Outcome.SUCCEEDED, status_code=200, body={"text": "ü\u2028"}))
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    record = orjson.loads(line)
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert record["id"].startswith("batch_req_")
    assert record["response"]["request_id"].startswith("req_")
    assert (record["custom_id"], record["response"]["status_code"], record["error"]) == ("c1", 200, None)
    assert encode_result(outcome(1, outcome=Outcome.SUCCEEDED, status_code=200, body={"text": "ü\u2028"})) == line


def test_error_lines():
    rejected = outcome(2, outcome=Outcome.REJECTED, status_code=400, body=error_body("no", param="n", code="unsupported_value"))
    record = orjson.loads(encode_result(rejected))
    assert record["response"]["status_code"] == 400
    assert record["response"]["body"]["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "n",
        "code": "unsupported_value",
    }
    assert record["error"] is None
    never_run = outcome(3, outcome=Outcome.FAILED, error_code="batch_expired", error_message="too late")
    record = orjson.loads(encode_result(never_run))
    assert record["response"] is None
    assert record["error"] == {"code": "batch_expired", "message": "too late"}


def test_the_parser_is_the_way_back():
    done = outcome(1, outcome=Outcome.SUCCEEDED, status_code=200, body={"a": 1})
    expired = outcome(2, outcome=Outcome.FAILED, error_code="batch_expired", error_message="m")
    data, placed = pack_results([done, expired])
    assert [item[0] for item in placed] == [done, expired]
    first, second = (decode_result(data[offset : offset + length]) for _, offset, length in placed)
    assert sum(length for *_, length in placed) == len(data)
    assert first == ResultLine(first.id, "c1", 200, first.request_id, {"a": 1}, None, None)
    assert second == ResultLine(second.id, "c2", None, None, None, "batch_expired", "m")
