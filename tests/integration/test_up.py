"""`longdraft up` and the commands that use it, as a user starts them: real processes, real servers, the stand-in engine."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

COMMAND = [sys.executable, "-m", "service.cli.main"]
LINES = 120


def job(path, count=LINES, bad=()):
    """A chat job; lines named in `bad` ask for something that is refused when they run."""
    with path.open("w") as file:
        for number in range(count):
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": f"say {number}"}], "max_tokens": 20}
            if number in bad:
                body["temperature"] = 9
            file.write(json.dumps({"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n")
    return path


def custom_ids(path):
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


class Machine:
    """One data folder and the commands run on it."""

    def __init__(self, folder: Path, **settings):
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LONGDRAFT_")}
        timing = {"LONGDRAFT_TIMING__COMMIT_EVERY": "0.2", "LONGDRAFT_TIMING__SWEEP": "1", "LONGDRAFT_TIMING__WORKER_IDLE": "2"}
        self.environment = {**kept, **timing, "LONGDRAFT_RUNNER": "standin", "LONGDRAFT_DATA_DIR": str(folder / "data"), **settings}

    def run(self, *arguments, check=True):
        done = subprocess.run([*COMMAND, *map(str, arguments)], env=self.environment, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        if check:
            assert done.returncode == 0, done.stderr + done.stdout
        return done

    def json(self, *arguments, check=True):
        return json.loads(self.run(*arguments, "--json", check=check).stdout.splitlines()[-1])

    @contextmanager
    def up(self):
        errors = (self.folder / "up.err").open("w+")
        process = subprocess.Popen(
            [*COMMAND, "up", "--port", "0", "--json"], env=self.environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        first = process.stdout.readline()
        assert first, (self.folder / "up.err").read_text()
        try:
            yield process, json.loads(first)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, (self.folder / "up.err").read_text()
            errors.close()

    def workers(self):
        """Process ids of the running workers, from the supervisor's own messages."""
        return self.workers_of((self.folder / "up.err").read_text())

    @staticmethod
    def workers_of(messages):
        started = [line.split() for line in messages.splitlines() if " started (pid " in line]
        pids = [int(words[-1].rstrip(")")) for words in started]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def test_submit_list_cost_keys_doctor_and_a_clean_end(folder):
    machine = Machine(folder)
    with machine.up() as (_, server):
        done = machine.run("submit", job(folder / "in.jsonl", bad={3}), "--wait", "-o", folder / "out.jsonl", check=False)
        assert done.returncode == 1, "a line failed, and the exit code says so"
        assert custom_ids(folder / "out.jsonl") == [f"id-{n}" for n in range(LINES) if n != 3]
        assert custom_ids(folder / "out.errors.jsonl") == ["id-3"]

        (batch,) = machine.json("list")
        assert batch["request_counts"] == {"total": LINES, "completed": LINES - 1, "failed": 1}
        assert machine.run("results", batch["id"]).stdout.encode() == (folder / "out.jsonl").read_bytes()
        summary = machine.json("cost")
        assert summary["total"]["amount"] == batch["cost"]["amount"] != "0"

        retried = machine.json("retry", batch["id"], "--wait", check=False)
        assert retried["parent_batch_id"] == batch["id"]
        assert retried["request_counts"] == {"total": 1, "completed": 0, "failed": 1}

        key = machine.json("keys", "create", "--name", "ci")
        as_other = Machine(folder, LONGDRAFT_URL=server["url"], LONGDRAFT_API_KEY=key["secret"])
        assert len(as_other.json("list")) == 2
        machine.run("keys", "revoke", key["id"])
        refused = as_other.run("list", check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "LONGDRAFT_API_KEY" in refused.stderr

        assert machine.json("db", "upgrade") == {"upgraded": True}
        second = machine.run("up", check=False)
        assert second.returncode == 1
        assert server["url"] in second.stderr
        findings = {finding["check"]: finding["status"] for finding in machine.json("doctor", check=False)}
        assert {findings[part] for part in ("database", "schema", "broker", "objects", "workers", "bill")} == {"ok"}, findings
    assert not (folder / "data" / "server.json").exists()
    assert "already up" not in machine.run("keys", "list").stderr


def test_a_killed_worker_is_replaced_and_a_job_survives_a_restart_of_everything(folder):
    slow = {"LONGDRAFT_STANDIN__DELAY": "0.4", "LONGDRAFT_STANDIN__CAPACITY": "8"}
    machine = Machine(folder, **slow)
    with machine.up():
        batch = machine.json("submit", job(folder / "in.jsonl"))
        pid = wait_for(machine.workers)[0]
        wait_for(lambda: machine.json("list")[0]["request_counts"]["completed"] > 0)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: any(other != pid for other in machine.workers()))
    done_before = None
    with machine.up():
        done_before = machine.json("list")[0]
        final = wait_for(lambda: (found := machine.json("list")[0])["status"] == "completed" and found)
        machine.run("results", batch["id"], "-o", folder / "out.jsonl")
    assert done_before["status"] in ("in_progress", "finalizing", "completed")
    assert final["id"] == batch["id"]
    assert final["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    assert custom_ids(folder / "out.jsonl") == [f"id-{n}" for n in range(LINES)]


def test_a_taken_port_and_a_wrong_setting_are_one_line(folder):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = Machine(folder).run("up", "--port", port, check=False)
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "--port" in done.stderr
    wrong = Machine(folder, LONGDRAFT_PROT="1").run("list", check=False)
    assert wrong.returncode == 1
    assert "LONGDRAFT_PROT" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_nobody_up_says_how_to_start(folder):
    done = Machine(folder).run("list", check=False)
    assert done.returncode == 1
    assert "longdraft up" in done.stderr


def test_the_demo_ends_with_answers_and_a_bill_and_leaves_nothing_running(folder):
    """With the stand-in engine; its model is a folder that is there already."""
    (folder / "model").mkdir()
    (folder / "longdraft.toml").write_text(f'[models.smollm2-135m]\nsource = "{folder / "model"}"\naliases = ["gpt-4o-mini"]\n')
    machine = Machine(folder, TMPDIR=str(folder))
    done = subprocess.run([*COMMAND, "demo"], env=machine.environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(custom_ids(folder / "build" / "demo" / "answers.jsonl")) == 68
    for words in ("68 of 68 lines delivered and charged", "classify-0", "extract-0", "build/demo/answers.jsonl"):
        assert words in done.stdout
    assert "All stopped" in done.stderr
    assert not list(folder.glob("longdraft-demo-*"))
    assert not machine.workers_of(done.stderr)


def test_run_needs_no_service(folder):
    machine = Machine(folder)
    done = machine.run("run", job(folder / "in.jsonl", bad={0, 5}), "--output", folder / "out.jsonl", "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["completed"] == LINES - 2
    assert custom_ids(folder / "out.jsonl") == [f"id-{n}" for n in range(LINES) if n not in (0, 5)]
    assert custom_ids(folder / "out.errors.jsonl") == ["id-0", "id-5"]
    assert not (folder / "data").exists()
