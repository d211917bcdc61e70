"""Logging: one line an event, in both formats, whoever logs."""

from __future__ import annotations

import subprocess
import sys

import orjson
import pytest

PROGRAM = """
import logging, sys, structlog
from service.config import load_settings
from service.log import configure_logging
configure_logging(load_settings({"HOME": "/"}, log_format=sys.argv[1], log_level="info"))
structlog.get_logger("ours").info("batch_validated", batch_id="batch_1", lines=3)
structlog.get_logger("ours").debug("too_quiet")
logging.getLogger("theirs").warning("plain %s", "words")
logging.getLogger("botocore").info("chatter")
try:
    secret = "a prompt"
    raise ValueError("broken")
except ValueError:
    structlog.get_logger("ours").exception("failed", batch_id="batch_1")
"""


def logged(form: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, form], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_json_lines_carry_level_time_logger_and_ids() -> None:
    out, err = logged("json")
    events = [orjson.loads(line) for line in err.splitlines()]
    assert out == ""
    assert [(event["event"], event["level"], event["logger"]) for event in events] == [
        ("batch_validated", "info", "ours"),
        ("plain words", "warning", "theirs"),
        ("failed", "error", "ours"),
    ]
    assert (events[0]["batch_id"], events[0]["lines"]) == ("batch_1", 3)
    assert all(event["timestamp"].endswith("Z") for event in events)
    assert "ValueError: broken" in events[2]["exception"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_tracebacks_show_no_variables(form: str) -> None:
    _, err = logged(form)
    assert "ValueError: broken" in err
    assert "secret" not in err.replace('secret = "a prompt"', "")


def test_text_is_readable_and_uncoloured_where_nobody_looks() -> None:
    _, err = logged("text")
    assert "\x1b[" not in err
    assert "batch_validated" in err
    assert "batch_id=batch_1" in err
    assert "too_quiet" not in err
    assert "chatter" not in err
