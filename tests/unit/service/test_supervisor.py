"""When workers start and what happens when they end; the port; what `up` writes down. No servers needed."""

import json
import os
import socket
import stat
import subprocess
import sys

import pytest

from service import worker_pool
from service.children import Child, describe_exit
from service.config import load_settings
from service.errors import ConfigError
from service.running import RunningServer
from service.supervisor import child_environment, deployment, listen
from service.worker_pool import Workers


class FakeChild(Child):
    """A child that runs until the test sets its status."""

    def __init__(self, name, log):
        super().__init__(name, [], {}, log)
        self.status = None

    def start(self):
        self.started = worker_pool.time.monotonic()

    def ended(self):
        return self.status


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(worker_pool, "time", clock)
    return clock


@pytest.fixture
def released():
    return []


@pytest.fixture
def workers(clock, released, tmp_path):
    return Workers(2, lambda worker_id, slot: FakeChild(worker_id, tmp_path / "log"), released.append, lambda text: None)


def test_no_worker_without_work(workers):
    workers.fit(0)
    assert not workers.live


def test_the_first_group_starts_one_worker_at_once_and_a_second_only_if_work_stays(workers, clock):
    workers.fit(5)
    workers.fit(5)
    assert len(workers.live) == 1
    clock.now += worker_pool.SECOND_WORKER_AFTER
    workers.fit(5)
    assert len(workers.live) == 2


def test_never_more_than_the_limit(workers, clock):
    for _ in range(5):
        workers.fit(5)
        clock.now += 10
    assert len(workers.live) == 2


def test_an_idle_worker_leaves_without_ado(workers, released):
    workers.fit(1)
    (child,) = workers.live.values()
    child.status = 0
    workers.reap()
    assert not workers.live
    assert not released
    workers.fit(1)
    assert len(workers.live) == 1


def test_a_dead_worker_gives_its_leases_back_at_once_and_the_next_waits_longer_each_time(workers, clock, released):
    pauses = []
    for _ in range(3):
        workers.fit(1)
        ((worker_id, child),) = workers.live.items()
        child.status = -9
        workers.reap()
        assert released[-1] == worker_id
        pauses.append(workers.backoff.not_before - clock.now)
        workers.fit(1)
        assert not workers.live, "started in spite of the pause"
        clock.now = workers.backoff.not_before
    assert pauses == [0.5, 1.0, 2.0]


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
            listen("127.0.0.1", port)


def test_exit_codes_and_signals_have_names():
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-9) == "SIGKILL"
    assert describe_exit(-200) == "signal 200"


def test_children_get_addresses_but_not_the_owner_of_the_schema_or_the_key(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGDRAFT_API_KEY", "own-secret-key")
    monkeypatch.setenv("LONGDRAFT_MIGRATION_DATABASE_URL", "postgresql://owner@db/x")
    settings = load_settings(data_dir=tmp_path, database_url="postgresql://app@db/x", broker_url="redis://b", blob_url="file:///b")
    environment = child_environment(settings)
    assert environment["LONGDRAFT_DATABASE_URL"] == "postgresql://app@db/x"
    assert "LONGDRAFT_API_KEY" not in environment
    assert "LONGDRAFT_MIGRATION_DATABASE_URL" not in environment
    child = load_settings({**environment})
    assert (child.database_url, child.broker_url, child.blob_url) == (settings.database_url, settings.broker_url, settings.blob_url)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/longdraft"])
def test_a_data_folder_that_cannot_be_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    folder = tmp_path / place
    with pytest.raises(ConfigError, match="Cannot keep data in") as refused, deployment(load_settings(data_dir=folder)):
        pass
    assert str(folder) in refused.value.message
    assert "--data-dir" in refused.value.message


class TestRunningServer:
    def server(self, **changes):
        values = {"url": "http://127.0.0.1:1", "api_key": "k", "pid": os.getpid(), "database_url": "d", "broker_url": "b"}
        return RunningServer(**{**values, "migration_database_url": None, "blob_url": None, **changes})

    def test_comes_back_as_written_and_only_the_owner_may_read_it(self, tmp_path):
        self.server().write(tmp_path)
        assert RunningServer.read(tmp_path) == self.server()
        assert stat.S_IMODE((tmp_path / "server.json").stat().st_mode) == 0o600
        assert [path.name for path in tmp_path.iterdir()] == ["server.json"]

    def test_one_whose_process_is_gone_is_not_running(self, tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.server(pid=child.pid).write(tmp_path)
        assert RunningServer.read(tmp_path) == self.server(pid=child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert RunningServer.read(tmp_path) is None  # it has ended, though nobody took its status yet
        child.communicate()
        assert RunningServer.read(tmp_path) is None

    def test_one_whose_number_another_process_has_by_now_is_not_running(self, tmp_path):
        self.server().write(tmp_path)
        written = json.loads((tmp_path / "server.json").read_text())
        boot, ticks = written["born"].split("/")
        for born in (f"{boot}/{int(ticks) - 1}", f"another-boot/{ticks}"):
            (tmp_path / "server.json").write_text(json.dumps({**written, "born": born}))
            assert RunningServer.read(tmp_path) is None

    def test_half_a_file_is_not_running(self, tmp_path):
        (tmp_path / "server.json").write_text('{"url": ')
        assert RunningServer.read(tmp_path) is None

    def test_removing_what_is_not_there_is_fine(self, tmp_path):
        RunningServer.remove(tmp_path)
