"""What people see: bills, figures, and how errors reach them."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.cli import bill, main
from service.cli.batch_cmds import endpoint_of, errors_path, require_place, save
from service.cli.output import Failure, print_table
from service.cli.progress import counting, speed, states, watch

REPORT = {
    "batch_id": "batch_1",
    "amount": "0.00035212",
    "final": True,
    "lines": {"total": 68, "billed": 67},
    "meters": [{"meter": "cached_input", "model": "m", "quantity": 8736, "dollars_per_million": "0.01", "amount": "0.00008736"}],
    "speculation": {"drafted": 100, "verified": 80, "accepted": 40, "pruned": 20, "acceptance_rate": 0.5, "acceptance_length": 1.25}
    | {"saved_seconds_estimate": 1.25, "estimate_error": -0.07},
    "device_seconds": {"prefill": 1.0, "draft": 0.5, "decode": 2.5, "total": 4.0},
}


def test_a_bill_shows_every_digit_and_what_speculation_did(capsys):
    bill.print_report(REPORT)
    shown = capsys.readouterr().out
    for words in (
        "cached input",
        "8,736",
        "$0.00008736",
        "$0.00035212",
        "67 of 68 lines",
        "40 accepted (50%",
        "20% fewer steps",
        "saved about 1.2 s",
        "7% off",
    ):
        assert words in shown


def test_a_bill_without_drafts_or_steps(capsys):
    nothing = dict.fromkeys(REPORT["speculation"], 0) | dict.fromkeys(
        ("acceptance_rate", "acceptance_length", "saved_seconds_estimate", "estimate_error")
    )
    bill.print_report({**REPORT, "final": False, "speculation": nothing})
    shown = capsys.readouterr().out
    assert "so far" in shown
    assert "nothing was drafted" in shown
    bill.print_report({**REPORT, "speculation": {**nothing, "drafted": 4}})
    assert "No line has been decoded yet" in capsys.readouterr().out


def test_what_is_counted_says_its_pace_where_nobody_watches(capsys, monkeypatch):
    now = iter([0.0, 4.0, 11.0, 12.0, 30.0, 34.0])
    monkeypatch.setattr("service.cli.progress.time.monotonic", lambda: next(now))
    with counting() as tick:
        for done in (100, 104, 122, 124):  # an interrupted run goes on at 100: its pace is that of what it does now
            tick("steps", done, 124)
        tick("answers", 0, 2)
        tick("answers", 1, 2)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "steps: 122 of 124, 2.0/s · ETA 0:01",
        "steps: 124 of 124, 2.0/s",
    ]


def test_sums_of_money_are_exact(capsys):
    usage = {"input_tokens": 1, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 1}
    cost = {"amount": "0.000000000000001", "currency": "usd", "final": True}
    batches = [{"id": f"b{n}", "status": "completed", "request_counts": {"total": 1}, "usage": usage, "cost": cost} for n in range(3)]
    bill.print_summary(batches, as_json=True)
    assert json.loads(capsys.readouterr().out)["total"]["amount"] == "0.000000000000003"
    bill.print_summary(batches, as_json=False)
    assert "$0.000000000000003" in capsys.readouterr().out


def test_figures_leave_out_what_is_not_known():
    assert speed(None, None, None, 0) == ""
    assert speed(181.4, 1.336, 62.9, 2) == "181 tok/s · acceptance length 1.34 · ETA 1:02 · 2 failed"


def test_cells_are_text_and_never_markup(capsys):
    print_table(("name",), [("[bold]x[/bold]",)])
    assert "[bold]x[/bold]" in capsys.readouterr().out


class FakeServer:
    def __init__(self, *answers):
        self.answers = list(answers)

    def get(self, path):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def download(self, file_id):
        yield b"content of "
        yield file_id.encode()


def batch(status, completed=0, **more):
    return {"id": "b", "status": status, "request_counts": {"total": 2, "completed": completed, "failed": 0}, **more}


def test_watching_survives_a_server_that_restarts_and_ends_with_the_batch():
    from service.cli.client import Unreachable

    server = FakeServer(batch("validating"), Unreachable("gone"), batch("in_progress", 1), batch("completed", 2))
    seen = [found["status"] for found in states(server, "b", sleep=lambda _: None)]
    assert seen == ["validating", "in_progress", "completed"]


def test_watching_ends_when_the_server_stays_away(monkeypatch):
    from service.cli.client import Unreachable

    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(Unreachable):
        list(states(FakeServer(*[Unreachable("gone")] * 20), "b", sleep=lambda _: None))


def test_watch_in_json_prints_a_line_for_every_change(capsys):
    server = FakeServer(batch("in_progress"), batch("in_progress"), batch("completed", 2))
    assert watch(server, "b", as_json=True)["status"] == "completed"
    assert [json.loads(line)["status"] for line in capsys.readouterr().out.splitlines()] == ["in_progress", "completed"]


def test_saving_writes_what_there_is(tmp_path):
    output = tmp_path / "out.jsonl"
    saved = save(FakeServer(), batch("completed", output_file_id="f1", error_file_id=None), output)
    assert output.read_text() == "content of f1"
    assert saved == {"output": str(output), "errors": None}
    save(FakeServer(), batch("completed", output_file_id=None, error_file_id="f2"), output)
    assert (tmp_path / "out.errors.jsonl").read_text() == "content of f2"
    with pytest.raises(Failure, match="Cannot write"):
        save(FakeServer(), batch("completed", output_file_id="f", error_file_id=None), tmp_path / "no" / "out.jsonl")


def test_what_an_earlier_batch_left_does_not_stay_beside_the_new_files(tmp_path):
    output, errors = tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"
    save(FakeServer(), batch("completed", output_file_id="f1", error_file_id="f2"), output)
    save(FakeServer(), batch("failed", output_file_id=None, error_file_id=None), output)
    assert (output.exists(), errors.exists()) == (True, True)  # a batch without results replaces none
    save(FakeServer(), batch("completed", output_file_id="f3", error_file_id=None), output)
    assert (output.exists(), errors.exists()) == (True, False)
    save(FakeServer(), batch("completed", output_file_id=None, error_file_id="f4"), output)
    assert (output.exists(), errors.exists()) == (False, True)


def test_answers_need_a_place_before_anything_starts(tmp_path):
    require_place(tmp_path / "out.jsonl")
    with pytest.raises(Failure, match="no/out"):
        require_place(tmp_path / "no" / "out.jsonl")
    with pytest.raises(Failure, match="a folder"):
        require_place(tmp_path)
    with pytest.raises(Failure, match="no regular file"):
        require_place(Path("/dev/null"))


def test_answers_never_go_over_the_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.errors.jsonl")
    for output, job in (("a.jsonl", "./a.jsonl"), ("a.jsonl", "a.errors.jsonl"), ("a.jsonl", "link.jsonl")):
        with pytest.raises(Failure, match="would go over"):
            require_place(Path(output), Path(job))
    require_place(Path("a.jsonl"), Path("b.jsonl"))


@pytest.mark.parametrize("arguments", [["retry", "batch_1"], ["submit", "job.jsonl"]])
def test_an_output_that_would_not_be_written_is_refused(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["longdraft", *arguments, "-o", "out.jsonl"])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
    assert "-o needs --wait" in capsys.readouterr().err


def test_names_of_error_files(tmp_path):
    assert errors_path(tmp_path / "answers.jsonl").name == "answers.errors.jsonl"
    assert errors_path(tmp_path / "answers.txt").name == "answers.txt.errors.jsonl"


@pytest.mark.parametrize("content", ["not json\n", '{"custom_id": "a"}\n', "[1]\n", '{"url": 7}\n', "\n\n"])
def test_a_file_whose_lines_name_no_url_is_no_job(tmp_path, content):
    path = tmp_path / "job.jsonl"
    path.write_text(content)
    with pytest.raises(Failure, match="is no batch job: none of its first 1,000 lines"):
        endpoint_of(path)
    path.write_text("")
    with pytest.raises(Failure, match="is no batch job: it is empty"):
        endpoint_of(path)


@pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b"not json\n", b"\n", b'{"url": 7}\n[1]\n', b"\xff\xfe\n"])
def test_the_endpoint_comes_from_the_first_line_that_has_one(tmp_path, before):
    path = tmp_path / "job.jsonl"
    path.write_bytes(before + b'{"url": "/v1/completions"}\n{"url": "/v1/other"}\n')
    assert endpoint_of(path) == "/v1/completions"


def test_expected_errors_are_one_line_and_exit_code_1(monkeypatch, capsys):
    def fail(**_):
        raise Failure("The lamp is broken: bulb 7. Replace it.")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "longdraft: The lamp is broken: bulb 7. Replace it.\n"


def test_a_full_disk_is_one_line_and_other_surprises_are_not_hidden(monkeypatch, capsys):
    def fail(number):
        def full(**_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(main, "app", full)

    fail(errno.ENOSPC)
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "longdraft: Cannot write: No space left on device. Make room and try again.\n"
    fail(errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main.main()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["batch_1", "--csv"], "BATCH and --csv"),
        (["batch_1", "--by", "day"], "BATCH and --by"),
        (["--focus", "bill.csv", "--by", "model"], "--focus and --by"),
        (["--workers", "--project", "default"], "--workers and --project"),
        (["--workers", "--plot", "w.png"], "--workers and --plot"),
        (["--plot", "c.png", "--json"], "--plot and --json"),
        (["--csv", "--json"], "--csv and --json"),
    ],
)
def test_reports_leave_no_option_out_in_silence(options, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longdraft", "cost", *options])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
    assert f"{words} do not go together" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    heavy = ("torch", "pydantic", "httpx", "sqlalchemy", "fastapi")
    code = f"import sys; import service.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
