"""Delivered answers against plain runs: a real engine on a tiny model, output files as `run` writes them, tampered ones among them."""

from __future__ import annotations

import json

import pytest

from service.adapters.engine_runner import EngineRunner
from service.cli.local_run import read_job, run_job
from service.cli.output import Failure
from service.cli.verify import Difference, compare, lines_of, sample, with_requests
from service.config import EngineSettings, ModelEntry
from tests.tiny_model import make_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    settings = EngineSettings(device="cpu", kv_memory="4MiB", max_sequences=4, threads=1)
    return EngineRunner({"tiny": ModelEntry(source=str(folder))}, settings, tmp_path_factory.mktemp("cache"))


def delivered(runner, tmp_path, endpoint, *bodies):
    """(lines of the job, lines of its output file)."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"custom_id": f"l{n}", "method": "POST", "url": endpoint, "body": {"model": "m", **body}} for n, body in enumerate(bodies)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = read_job(source, lambda _: "tiny", max_line_bytes=1 << 20, max_json_depth=50)
    assert run_job(job, source, output, runner, drafter="auto", tick=lambda _: None).failed == 0
    return source.read_bytes().splitlines(), output.read_bytes().splitlines()


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 24, **more}


def tampered(line, choice, change):
    row = json.loads(line)
    message = row["response"]["body"]["choices"][choice]["message"]
    message["content"] = change(message["content"])
    return json.dumps(row).encode()


def test_answers_of_speculation_are_plain_decodings(runner, tmp_path):
    bodies = [
        chat("a b a b a b", temperature=0),
        chat("hello", seed=3, n=2),
        chat("hello", temperature=1),
        chat("x", temperature=0, logprobs=True),
    ]
    job, output = delivered(runner, tmp_path, CHAT, *bodies)
    report = compare(with_requests(sample(output, 9, "s"), job), runner)
    assert (report.compared, report.equal, report.unrepeatable, report.failed) == (3, 3, 1, [])
    assert report.passed
    ((then, now),) = report.made
    assert then["drafter"] != now["drafter"] == "off"
    assert {name: then[name] for name in ("model", "revision", "dtype", "engine")} == {
        name: now[name] for name in ("model", "revision", "dtype", "engine")
    }


def test_a_tampered_answer_is_found_with_its_gap(runner, tmp_path):
    job, output = delivered(
        runner, tmp_path, CHAT, chat("one", temperature=0, logprobs=True, top_logprobs=20), chat("two", temperature=0, n=2)
    )
    row = json.loads(output[0])["response"]["body"]["choices"][0]
    entries = row["logprobs"]["content"]
    other = next(top for top in entries[2]["top_logprobs"] if top["token"] != entries[2]["token"] and top["token"].isprintable())
    start = "".join(entry["token"] for entry in entries[:2])
    output[0] = tampered(output[0], 0, lambda text: start + other["token"] + "ZZZ")
    output[1] = tampered(output[1], 1, lambda text: text + "more")
    report = compare(with_requests(sample(output, 2, "s"), job), runner)
    assert (report.compared, report.equal, report.passed) == (2, 0, False)
    first, second = sorted(report.differences, key=lambda difference: difference.custom_id)
    assert (first.custom_id, first.choice, first.at) == ("l0", 0, len(start))
    assert first.gap == pytest.approx(entries[2]["logprob"] - other["logprob"], abs=1e-4)
    assert first.delivered.startswith(other["token"])
    assert (second.custom_id, second.choice, second.gap) == ("l1", 1, None)
    assert report.as_json()["differences"][0].keys() >= {"logit_gap", "tie"}


def test_completions_and_what_cannot_be_run_again(runner, tmp_path):
    job, output = delivered(
        runner, tmp_path, COMPLETIONS, {"prompt": "abc", "temperature": 0}, {"prompt": ["a", "b"], "seed": 1, "echo": True}
    )
    assert compare(with_requests(sample(output, 2, "s"), job), runner).passed
    broken = [line.replace(b'"prompt": "abc"', b'"prompt": "' + b"a" * 400 + b'"') for line in job]
    report = compare(with_requests(sample(output, 2, "s"), broken), runner)
    assert [name for name, _ in report.failed] == ["l0"]
    assert not report.passed


def test_ties_pass():
    assert Difference("a", 0, 3, "x", "y", 5e-5).tie
    assert not Difference("a", 0, 3, "x", "y", 5e-4).tie
    assert not Difference("a", 0, 3, "x", "y", None).tie


def test_samples_are_of_the_size_asked_for_and_repeat():
    rows = [json.dumps({"custom_id": f"c{n}", "response": {"body": {"n": n}}}).encode() for n in range(200)]
    first = sample(rows, 20, "batch_1")
    assert len(first) == 20
    assert sample(rows, 20, "batch_1") == first
    assert sample(rows, 20, "batch_2") != first
    assert len(sample(rows[:5], 20, "batch_1")) == 5
    with pytest.raises(Failure, match="does not have the lines"):
        with_requests(first, rows[:0])


def test_lines_come_whole_out_of_portions():
    assert list(lines_of([b"ab\nc", b"", b"d\n\ne"])) == [b"ab", b"cd", b"", b"e"]
