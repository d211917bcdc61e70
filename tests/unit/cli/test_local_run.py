"""The in-process run with a runner that needs no model."""

import json
from collections.abc import Iterator

import pytest

from service.cli.local_run import read_job, run_job
from service.cli.output import Failure
from service.domain.line import LineOutcome, Outcome
from service.domain.usage import Usage, Work

CHAT = "/v1/chat/completions"
MODELS = {"small": "small", "alias": "small", "big": "big"}


def line(custom_id, model="small", **body):
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": model, "messages": [], **body}}


def write(path, *lines):
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


class Reverse:
    """Takes everything, answers backwards; rejects bodies that say so; stops like Ctrl-C after `interrupt_after` answers."""

    def __init__(self, interrupt_after=None):
        self.loaded = []
        self.answered = 0
        self.interrupt_after = interrupt_after

    def load(self, model):
        self.loaded.append(model)

    def run(self, lines) -> Iterator[LineOutcome]:
        for work in reversed(list(lines)):
            if self.answered == self.interrupt_after:
                raise KeyboardInterrupt
            self.answered += 1
            key = (work.batch_id, work.line_no, work.group_id, work.custom_id)
            if work.body.get("bad"):
                yield LineOutcome(*key, Outcome.REJECTED, status_code=400, body={"error": {"message": "no"}})
            else:
                usage, spent = Usage(input_tokens=3, output_tokens=2), Work(sampled=2, steps=1)
                yield LineOutcome(*key, Outcome.SUCCEEDED, 200, {"echo": work.custom_id, "by": work.model}, usage=usage, work=spent)


def run(tmp_path, *lines, runner=None):
    source, output = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    job = read_job(source, MODELS.get, max_line_bytes=1 << 20, max_json_depth=50)
    tally = run_job(job, source, output, runner or Reverse(), drafter="auto", tick=lambda _: None)
    return tally, read(output), tmp_path / "out.errors.jsonl"


def test_answers_come_in_input_order_whatever_order_they_finish_in(tmp_path):
    tally, answers, errors = run(tmp_path, *(line(f"id-{number}") for number in range(20)))
    assert [answer["custom_id"] for answer in answers] == [f"id-{number}" for number in range(20)]
    assert answers[3]["response"]["body"] == {"echo": "id-3", "by": "small"}
    assert not errors.exists()
    assert (tally.completed, tally.failed, tally.usage.output_tokens, tally.acceptance_length) == (20, 0, 40, 2.0)


def test_every_bad_line_is_in_the_error_file_and_the_others_run(tmp_path):
    tally, answers, errors = run(
        tmp_path,
        line("good"),
        '{"custom_id": "torn", ',
        line("refused", bad=True),
        line("good"),
        line("unknown", model="nobody"),
        line("last"),
    )
    assert [answer["custom_id"] for answer in answers] == ["good", "last"]
    found = [(entry["custom_id"], entry["response"]["body"]["error"].get("code")) for entry in read(errors)]
    assert found == [(None, "invalid_json_line"), ("refused", None), ("good", "duplicate_custom_id"), ("unknown", "model_not_found")]
    assert (tally.completed, tally.failed) == (2, 4)


def test_each_model_is_loaded_once_and_order_is_kept_across_models(tmp_path):
    runner = Reverse()
    _, answers, _ = run(tmp_path, line("a"), line("b", "big"), line("c", "alias"), line("d", "big"), runner=runner)
    assert runner.loaded == ["small", "big"]
    assert [(answer["custom_id"], answer["response"]["body"]["by"]) for answer in answers] == [
        ("a", "small"),
        ("b", "big"),
        ("c", "small"),
        ("d", "big"),
    ]


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *(line(f"id-{number}") for number in range(5)), runner=Reverse(interrupt_after=2))
    assert [answer["custom_id"] for answer in read(tmp_path / "out.jsonl")] == ["id-3", "id-4"]
    unfinished = read(tmp_path / "out.errors.jsonl")
    assert [entry["custom_id"] for entry in unfinished] == ["id-0", "id-1", "id-2"]
    assert {entry["error"]["code"] for entry in unfinished} == {"batch_cancelled"}


def test_the_error_file_of_an_earlier_run_does_not_stay(tmp_path):
    run(tmp_path, line("a", bad=True))
    assert (tmp_path / "out.errors.jsonl").exists()
    run(tmp_path, line("a"))
    assert not (tmp_path / "out.errors.jsonl").exists()


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_requests_is_refused(tmp_path, content):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(Failure):
        read_job(tmp_path / "in.jsonl", MODELS.get, max_line_bytes=1000, max_json_depth=50)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(Failure, match="absent"):
        read_job(tmp_path / "absent.jsonl", MODELS.get, max_line_bytes=1000, max_json_depth=50)
