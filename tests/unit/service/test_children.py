"""Child processes: real ones, short-lived."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from service.children import HEALTHY_SECONDS, Backoff, Child, stop_all


def make_child(tmp_path, code, name="child"):
    return Child(name, [sys.executable, "-c", code], dict(os.environ), tmp_path / f"{name}.log")


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class TestBackoff:
    def test_pauses_double_up_to_the_longest(self):
        backoff = Backoff(first=1.0, longest=5.0)
        assert [backoff.failed(now=0.0, lived=0.1) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]

    def test_a_long_life_starts_over(self):
        backoff = Backoff(first=1.0)
        for _ in range(4):
            backoff.failed(now=0.0, lived=0.1)
        assert backoff.failed(now=100.0, lived=HEALTHY_SECONDS) == 1.0
        assert backoff.not_before == 101.0


def test_the_exit_status_is_reported_once(tmp_path):
    child = make_child(tmp_path, "raise SystemExit(3)")
    child.start()
    statuses = []
    wait_for(lambda: (status := child.ended()) is not None and statuses.append(status) is None)
    assert statuses == [3]
    assert child.ended() is None
    assert not child.running


def test_last_words_are_the_last_line_of_the_log(tmp_path):
    child = make_child(tmp_path, "print('first'); print('the reason'); raise SystemExit(1)")
    child.start()
    wait_for(lambda: not child.running)
    assert child.last_words() == "the reason"


def test_stop_all_kills_what_does_not_listen(tmp_path):
    ready = "import signal, time; print('up', flush=True);"
    polite = make_child(tmp_path, f"{ready} time.sleep(60)", "polite")
    deaf = make_child(tmp_path, f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {ready} time.sleep(60)", "deaf")
    for child in (polite, deaf):
        child.start()
        wait_for(lambda child=child: child.last_words() == "up")
    stop_all([polite, deaf], grace=0.3)
    assert polite.ended() == -signal.SIGTERM
    assert deaf.ended() == -signal.SIGKILL


CHILD = """
import os, pathlib, sys, time
from service.children import die_with
die_with(int(sys.argv[1]))
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]], start_new_session=True)
time.sleep(60)
"""


def test_children_end_when_their_supervisor_is_killed(tmp_path):
    """Three generations, because it is the middle one that dies."""
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD, str(pid_file)])
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    grandchild = Path("/proc") / pid_file.read_text()
    parent.kill()
    parent.wait()
    wait_for(lambda: not grandchild.exists() or "\nState:\tZ" in (grandchild / "status").read_text())
