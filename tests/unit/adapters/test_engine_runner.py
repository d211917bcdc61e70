"""The engine behind the runner's port: a real engine on a tiny random model."""

import json
import re

import jsonschema
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from engine.grammars.frames import Limits
from service.adapters.engine_runner import EngineRunner
from service.config import EngineSettings, ModelEntry
from service.domain.line import LineWork, Outcome
from service.errors import ModelUnavailable
from tests.tiny_model import CONTEXT, TEMPLATE, make_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runner(folder, tmp_path_factory):
    settings = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=4, threads=1)
    runner = EngineRunner({"tiny": ModelEntry(source=str(folder))}, settings, tmp_path_factory.mktemp("cache"))
    runner.load("tiny")
    return runner


def chat(number, text="hello", **body):
    body = {"model": "alias", "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **body}
    return LineWork("batch_1", number, 7, f"id-{number}", "tiny", CHAT, body)


def run(runner, *lines):
    return {outcome.line_no: outcome for outcome in runner.run(lines)}


def test_a_chat_line_gets_openais_answer(runner):
    (outcome,) = runner.run([chat(1)])
    assert outcome.outcome is Outcome.SUCCEEDED
    assert (outcome.batch_id, outcome.line_no, outcome.group_id, outcome.custom_id) == ("batch_1", 1, 7, "id-1")
    answer = ChatCompletion.model_validate(outcome.body, strict=True)
    assert answer.model == "tiny"
    assert answer.system_fingerprint.startswith("ld-")
    assert answer.usage.prompt_tokens == len("<user>hello<assistant>")
    assert 1 <= answer.usage.completion_tokens <= 8
    assert outcome.usage.input_tokens == answer.usage.prompt_tokens
    assert outcome.work.sampled >= outcome.usage.output_tokens
    assert outcome.work.cached + outcome.work.prefilled >= outcome.usage.input_tokens
    assert outcome.work.device_ns > 0


def test_completions_take_text_and_token_ids(runner):
    text = LineWork("b", 1, 1, "t", "tiny", COMPLETIONS, {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0})
    same = LineWork("b", 2, 1, "i", "tiny", COMPLETIONS, {**text.body, "prompt": list(runner._loaded.engine.tokenizer.encode("abc"))})
    outcomes = run(runner, text, same)
    assert Completion.model_validate(outcomes[1].body, strict=True).choices[0].text == outcomes[2].body["choices"][0]["text"]


@pytest.mark.parametrize(
    ("line", "param", "words"),
    [
        (chat(1, temperature=9), "temperature", "9"),
        (chat(1, text="x" * CONTEXT), "messages", f"{CONTEXT} tokens are this model's maximum context"),
        (chat(1, max_tokens=CONTEXT), "max_tokens", "for the answer"),
        (chat(1, messages=[{"role": "assistant", "content": "me first"}]), "messages", "cannot begin with the assistant"),
        (LineWork("b", 1, 1, "x", "tiny", COMPLETIONS, {"model": "tiny", "prompt": [1, 99999]}), "prompt", "99999"),
        (LineWork("b", 1, 1, "x", "tiny", CHAT, chat(1).body, drafter="psychic"), "drafter", "psychic"),
    ],
)
def test_what_cannot_be_run_is_a_400_that_names_the_value_and_the_others_run(runner, line, param, words):
    outcomes = run(runner, line, chat(2))
    refused = outcomes[1]
    assert (refused.outcome, refused.status_code, refused.body["error"]["param"]) == (Outcome.REJECTED, 400, param)
    assert words in refused.body["error"]["message"]
    assert refused.usage.total_tokens == 0
    assert outcomes[2].outcome is Outcome.SUCCEEDED


def test_what_the_kv_cache_can_never_hold_is_a_400_and_what_fills_it_runs(folder, tmp_path):
    """Ten blocks of 16 tokens: one is never handed out, so a prompt and its answer may have 144 together, and not one more."""
    block_bytes = 2 * 2 * 2 * 8 * 4 * 16
    settings = EngineSettings(device="cpu", kv_memory=str(10 * block_bytes), max_sequences=4, threads=1)
    small = EngineRunner({"tiny": ModelEntry(source=str(folder))}, settings, tmp_path)
    small.load("tiny")
    prompt = len("<user>hello<assistant>")
    outcomes = run(small, chat(1, max_tokens=145 - prompt), chat(2, max_tokens=144 - prompt), chat(3))
    assert (outcomes[1].outcome, outcomes[1].body["error"]["code"]) == (Outcome.REJECTED, "context_length_exceeded")
    assert "144 tokens are what this worker's KV cache holds" in outcomes[1].body["error"]["message"]
    assert outcomes[2].outcome is outcomes[3].outcome is Outcome.SUCCEEDED
    stats = small.stats()
    assert stats.context == 144
    assert block_bytes < stats.kv_peak_bytes <= stats.kv_bytes == 9 * block_bytes


def test_without_a_limit_the_answer_may_fill_the_context(runner):
    (outcome,) = runner.run([chat(1, max_tokens=None, text="fill it")])
    assert outcome.outcome is Outcome.SUCCEEDED
    assert outcome.usage.total_tokens <= CONTEXT
    assert outcome.body["choices"][0]["finish_reason"] == "stop" or outcome.usage.total_tokens == CONTEXT


def test_a_feeder_that_waits_for_a_rejection_gets_it(runner):
    """A worker commits a group before it brings the next line; nothing is running meanwhile that could carry the rejection out."""
    seen = []

    def lines():
        yield chat(1, temperature=9)
        waited = 0
        while not seen:
            waited += 1
            assert waited < 1000, "the rejection was held back"
            yield None
        yield chat(2)

    for outcome in runner.run(lines()):
        seen += [outcome.line_no]
    assert seen == [1, 2]


def test_a_task_in_the_metadata_of_the_line_or_its_batch_names_what_drafts_for_it(runner):
    from dataclasses import replace

    from service.adapters.engine_runner.requests import prepare
    from service.domain.request_body import parse_body

    def template(line):
        (request,) = prepare(runner._loaded.engine, line, parse_body(line.endpoint, line.body)).requests
        return request.template

    assert template(replace(chat(1, metadata={"task": "mail"}), task="code")) == "mail"
    assert template(replace(chat(1, metadata={"team": "a"}), task="code")) == "code"
    assert template(chat(1)) == template(chat(2)) != template(chat(3, "another beginning"))


def completion(number, prompt, **body):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, **body}
    return LineWork("b", number, 1, f"c{number}", "tiny", COMPLETIONS, body)


def test_samples_of_a_line_share_its_prompt_and_its_bill(runner):
    one, three = chat(1, "tell me a story", seed=3, temperature=1), chat(2, "tell me a story", seed=3, temperature=1, n=3)
    first = run(runner, one)[1]
    outcome = run(runner, three)[2]
    answer = ChatCompletion.model_validate(outcome.body, strict=True)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == first.body["choices"][0]["message"]["content"]
    assert outcome.usage.input_tokens == first.usage.input_tokens
    assert outcome.usage.output_tokens > first.usage.output_tokens


def test_several_prompts_are_answered_in_order(runner):
    together = run(runner, completion(1, ["abc", "xyz"], n=2, seed=1, temperature=1))[1]
    alone = [run(runner, completion(1, prompt, n=2, seed=1, temperature=1))[1] for prompt in ("abc", "xyz")]
    assert [c["text"] for c in together.body["choices"]] == [c["text"] for one in alone for c in one.body["choices"]]
    assert together.usage.input_tokens == sum(one.usage.input_tokens for one in alone)


def test_scores_cover_the_text(runner):
    answer = run(runner, chat(1, logprobs=True, top_logprobs=2, stop="e"))[1].body["choices"][0]
    entries = answer["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == answer["message"]["content"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["top_logprobs"][0]["logprob"] >= entry["logprob"] for entry in entries)


def test_an_echoed_prompt_is_scored_without_generating(runner):
    outcome = run(runner, completion(1, "hello", echo=True, logprobs=1, max_tokens=0))[1]
    choice = outcome.body["choices"][0]
    assert choice["text"] == "hello"
    assert choice["logprobs"]["tokens"] == list("hello")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert outcome.usage.output_tokens == 0
    longer = run(runner, completion(1, "hello", echo=True, logprobs=1))[1].body["choices"][0]
    assert longer["logprobs"]["token_logprobs"][:5] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
    plain = run(runner, completion(1, "hello"))[1].body["choices"][0]
    assert longer["text"] == "hello" + plain["text"]


def test_rules_reach_the_engine(runner):
    plain = run(runner, chat(1, max_tokens=3))[1].body["choices"][0]["message"]["content"]
    tokenizer = runner._loaded.engine.tokenizer
    (letter,) = tokenizer.encode("q")
    assert run(runner, chat(1, max_tokens=3, logit_bias={str(letter): 100}))[1].body["choices"][0]["message"]["content"] == "qqq"
    banned = {str(token): -100 for token in tokenizer.encode(plain)}
    assert not set(run(runner, chat(1, max_tokens=3, logit_bias=banned))[1].body["choices"][0]["message"]["content"]) & set(plain)
    stopped = run(runner, chat(1, max_tokens=9, logit_bias={str(letter): 100}, stop_token_ids=[letter], min_tokens=4))[1]
    assert stopped.body["choices"][0]["finish_reason"] == "stop"
    assert stopped.usage.output_tokens == 5


def test_an_answer_says_what_made_it(runner):
    made = run(runner, chat(1))[1].body["longdraft"]
    assert (made["model"], made["dtype"], made["drafter"]) == ("tiny", "float32", runner._loaded.engine.drafters.resolve("auto"))
    assert "@" in made["revision"]
    assert made["engine"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"max_tokens": None, "min_tokens": CONTEXT}, "min_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"n": 128, "logprobs": True, "top_logprobs": 20, "max_tokens": 200}, "logprobs"),
    ],
)
def test_what_the_model_does_not_have_is_a_400(runner, body, param):
    outcome = run(runner, chat(1, **body))[1]
    assert (outcome.status_code, outcome.body["error"]["param"]) == (400, param)


def test_aborted_lines_yield_nothing_and_the_others_finish(runner):
    def lines():
        yield chat(1, max_tokens=200)
        yield chat(2)
        runner.abort([("batch_1", 1)])
        yield chat(3)

    assert {outcome.line_no for outcome in runner.run(lines())} == {2, 3}


def test_the_same_seed_gives_the_same_text_alone_and_in_company(runner):
    sampled = {"temperature": 0.8, "seed": 11, "max_tokens": 24}
    alone = run(runner, chat(1, "write", **sampled))[1].body["choices"][0]["message"]["content"]
    company = run(runner, *(chat(n, f"other {n}") for n in range(2, 9)), chat(1, "write", **sampled))
    assert company[1].body["choices"][0]["message"]["content"] == alone


def test_models_that_cannot_be_loaded_say_why(folder, tmp_path):
    runner = EngineRunner({"broken": ModelEntry(source=str(folder / "weights.bin"))}, EngineSettings(device="cpu"), tmp_path)
    with pytest.raises(ModelUnavailable, match=r"nothing.*known: broken"):
        runner.load("nothing")
    with pytest.raises(ModelUnavailable, match="broken"):
        runner.load("broken")
    with pytest.raises(RuntimeError, match="load"):
        next(runner.run([]))


def test_meters_survive_unloading(folder, tmp_path):
    settings = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=2)
    runner = EngineRunner({"tiny": ModelEntry(source=str(folder))}, settings, tmp_path)
    runner.load("tiny")
    list(runner.run([chat(1)]))
    before = runner.stats()
    runner.close()
    after = runner.stats()
    assert before.busy_ns > 0
    assert (after.busy_ns, after.load_ns, after.profile_ns) == (before.busy_ns, before.load_ns, before.profile_ns)
    assert runner.device == "cpu"


def test_recalled_answers_draft_for_other_lines(folder, tmp_path):
    """The same line again, on a worker that has only read its answer."""
    models, settings = {"tiny": ModelEntry(source=str(folder))}, EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=1, threads=1)
    line = chat(1, text="what was it again?", max_tokens=40)
    fresh = EngineRunner(models, settings, tmp_path)
    fresh.load("tiny")
    (first,) = fresh.run([line])
    text = first.body["choices"][0]["message"]["content"]
    knowing = EngineRunner(models, settings, tmp_path)
    knowing.load("tiny")
    knowing.recall([text])
    engine = knowing._loaded.engine
    siblings = engine._speculator._drafters["suffix"]._siblings[None]
    assert len(siblings) == len(engine.tokenizer.hf.encode(text, add_special_tokens=False)) + 1
    (second,) = knowing.run([line])
    assert second.body["choices"][0]["message"]["content"] == text


SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "code": {"enum": ["x1", "y2"]}}, "required": ["ok", "code"]}


def json_schema(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def test_answers_have_the_form_that_was_asked_for(runner):
    lines = [
        chat(1, max_tokens=80, response_format=json_schema(SCHEMA)),
        chat(2, max_tokens=80, response_format=json_schema(SCHEMA, strict=True), n=2, seed=4, temperature=1),
        chat(3, max_tokens=20, guided_regex="(ab|cd){2}[0-9]"),
        chat(4, max_tokens=230, response_format={"type": "json_object"}, logit_bias={"92": 30}),  # a liking for closing braces
        completion(5, "abc", max_tokens=20, guided_regex="x{3}"),
    ]
    outcomes = run(runner, *lines)
    texts = {n: [c.get("text") or c["message"]["content"] for c in outcome.body["choices"]] for n, outcome in outcomes.items()}
    for text in texts[1] + texts[2]:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert re.fullmatch("(ab|cd){2}[0-9]", texts[3][0])
    assert isinstance(json.loads(texts[4][0]), dict)
    assert texts[5] == ["xxx"]
    assert {choice["finish_reason"] for n in (1, 2, 3, 5) for choice in outcomes[n].body["choices"]} == {"stop"}
    assert outcomes[1].work.accepted > 0
    off = LineWork("batch_1", 2, 7, "id-2", "tiny", CHAT, lines[1].body, drafter="off")
    assert run(runner, off)[2].body["choices"] == outcomes[2].body["choices"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "parenthesis"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "Lookahead"),
        ({"response_format": json_schema({"type": "string", "not": {}})}, "response_format.json_schema.schema", "'not'"),
        ({"response_format": json_schema({"$ref": "#/x"})}, "response_format.json_schema.schema", "names nothing"),
        ({"response_format": json_schema(SCHEMA), "ignore_eos": True}, "ignore_eos", "where the answer ends"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "where the answer ends"),
    ],
)
def test_a_form_that_cannot_be_had_is_a_400_and_the_others_run(runner, body, param, words):
    outcomes = run(runner, chat(1, **body), chat(2))
    error = outcomes[1].body["error"]
    assert (outcomes[1].status_code, error["param"]) == (400, param)
    assert words in error["message"]
    assert outcomes[2].outcome is Outcome.SUCCEEDED


def test_a_hostile_form_holds_nobody_up(folder, tmp_path):
    """It is compiled for half a second and given up, while the other lines run; one line ends without it, aborted."""
    settings = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=4, threads=1)
    own = EngineRunner({"tiny": ModelEntry(source=str(folder))}, settings, tmp_path)
    own.load("tiny")
    own._loaded.engine.grammars._limits = Limits(cpu_seconds=0.5)
    hostile = "([ab]|a[bc]){0,4000}(x|y.){0,4000}.{0,9000}z"
    seen = []
    for outcome in own.run([chat(1, guided_regex=hostile), chat(2, guided_regex=hostile + "z"), chat(3), chat(4)]):
        seen.append(outcome.line_no)
        if outcome.line_no == 3:
            own.abort([("batch_1", 2)])
        if outcome.line_no == 1:
            assert "more than 0.5 s" in outcome.body["error"]["message"]
    assert sorted(seen) == [1, 3, 4]
    assert seen[-1] == 1


TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"properties": {"city": {"enum": ["Bern", "Rome"]}}, "required": ["city"]}},
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {"now": {"type": "boolean"}}}}},
]
TOOL_TEMPLATE = "{% if tools %}<tool_call>{{ tools | length }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("caller"))
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    settings = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=4, threads=1)
    runner = EngineRunner({"tiny": ModelEntry(source=str(folder))}, settings, tmp_path_factory.mktemp("cache"))
    runner.load("tiny")
    return runner


def test_a_required_call_is_a_call_of_one_of_the_functions(caller):
    named = {"type": "function", "function": {"name": "weather"}}
    outcomes = run(
        caller,
        chat(1, max_tokens=150, tools=TOOLS, tool_choice="required", n=3, seed=1, temperature=1),
        chat(2, max_tokens=150, tools=TOOLS, tool_choice=named),
    )
    for number, names in ((1, {"weather", "stop"}), (2, {"weather"})):
        answer = ChatCompletion.model_validate(outcomes[number].body, strict=True)
        for choice in answer.choices:
            (call,) = choice.message.tool_calls
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            assert call.function.name in names
            parameters = next(tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == call.function.name)
            jsonschema.validate(json.loads(call.function.arguments), {"type": "object", **parameters})
            assert call.id.startswith("call_")


def test_a_model_whose_template_knows_no_tools_says_so(runner):
    outcome = run(runner, chat(1, tools=TOOLS, tool_choice="required"))[1]
    assert (outcome.status_code, outcome.body["error"]["param"]) == (400, "tools")


def test_what_a_thinking_model_says_in_a_form_is_the_answer(tmp_path_factory):
    """Its template opens the thinking, which a form leaves no room for."""
    folder = make_tiny_model(tmp_path_factory.mktemp("thinker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE + "<think>{# closed by </think> #}")
    settings = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=4, threads=1)
    thinker = EngineRunner({"tiny": ModelEntry(source=str(folder))}, settings, tmp_path_factory.mktemp("cache"))
    thinker.load("tiny")
    outcomes = run(thinker, chat(1, max_tokens=20, guided_regex="(ab|cd){2}"), chat(2))
    formed, free = (outcomes[number].body["choices"][0]["message"] for number in (1, 2))
    assert re.fullmatch("(ab|cd){2}", formed["content"])
    assert "reasoning_content" not in formed
    assert outcomes[1].usage.reasoning_tokens == 0
    assert free["content"] == ""
    assert outcomes[2].usage.reasoning_tokens > 0
