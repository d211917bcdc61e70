"""The embedded servers: data that survives, one owner a folder, nothing left behind, nobody let in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import psycopg
import pytest
import redis

from service.adapters.unit_of_work import PostgresDatabase
from service.embedded import Endpoints, embedded_servers
from service.errors import Conflict, Unavailable


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deeper than a socket's name may be long, and as closed as root's own folders are."""
    return tmp_path_factory.mktemp("data") / ("deep-" * 10) / ("er-" * 20)


@pytest.fixture
def keep_away_from_var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where root's cluster goes when its folder is closed: into this test's own place, which everybody may enter."""
    from service.embedded import postgres, valkey

    home = Path("/tmp") / f"longdraft-home-{os.getpid()}-{time.monotonic_ns()}"
    for module in (postgres, valkey):
        monkeypatch.setattr(module, "ROOT_HOME", home)
    yield
    subprocess.run(["rm", "-rf", home], check=True)


def sockets(url: str) -> Path:
    return Path(parse_qs(urlsplit(url).query)["host"][0])


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def eventually(true: Callable[[], bool], limit: float = 30.0) -> bool:
    deadline = time.monotonic() + limit
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.usefixtures("keep_away_from_var")
def test_data_survives_a_restart_and_a_lock_file_that_names_somebody_else(folder: Path) -> None:
    before = set(children_of(os.getpid()))  # the session's own servers, if a test before this one wanted them
    with embedded_servers(folder) as first:
        cluster = Path(psycopg.connect(first.migration_database_url).execute("SHOW data_directory").fetchone()[0])
        with psycopg.connect(first.migration_database_url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    (cluster / "postmaster.pid").write_text(f"{os.getpid()}\n{cluster}\n")  # as after a crash, the id used again since
    with embedded_servers(folder) as second, psycopg.connect(second.migration_database_url) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
    assert not sockets(second.database_url).exists()
    left = [child for child in children_of(os.getpid()) if child not in before]
    assert not [child for child in left if child.cmdline() and str(cluster) in " ".join(child.cmdline())]


def test_only_one_runs_on_a_folder(folder: Path) -> None:
    from service.embedded import _only_one

    folder.mkdir(parents=True)
    with _only_one(folder), pytest.raises(Conflict, match="Another Longdraft is running on"), embedded_servers(folder):
        pass


def test_a_start_that_fails_ends_with_the_servers_own_words(tmp_path: Path) -> None:
    from service.embedded.process import Server, running

    def silent() -> None:
        raise ConnectionRefusedError

    broken = Server("Broken", ["sh", "-c", "echo no such option; exit 3"], tmp_path / "log", None, signal.SIGTERM, silent)
    with pytest.raises(Unavailable, match=r"(?s)Broken did not start.*no such option"), running(broken):
        pass


def test_nobody_is_let_in(servers: Endpoints) -> None:
    with psycopg.connect(servers.migration_database_url) as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
    assert sockets(servers.database_url).stat().st_mode & 0o077 == 0
    url = urlsplit(servers.database_url)
    wrong = servers.database_url.replace(url.password or "", "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong)
    with redis.Redis(unix_socket_path=urlsplit(servers.broker_url).path) as client:
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("save") == {"save": ""}


def test_servers_do_not_run_as_root(servers: Endpoints) -> None:
    mine = [child for child in children_of(os.getpid()) if child.name() in ("postgres", "valkey-server")]
    assert mine
    assert all(child.uids().effective != 0 for child in mine)


PARENT = """
import sys, time
from pathlib import Path
from service.embedded import embedded_servers, postgres, valkey
postgres.ROOT_HOME = valkey.ROOT_HOME = Path(sys.argv[2])
with embedded_servers(Path(sys.argv[1])) as endpoints:
    print(endpoints.migration_database_url, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the cluster to another user; run the tests as root to see it")
def test_a_closed_data_folder_is_walked_through_and_not_opened() -> None:
    with tempfile.TemporaryDirectory(prefix="longdraft-test-") as name:  # mode 0700 in a folder that is open to all
        folder = Path(name)
        with embedded_servers(folder) as endpoints:
            assert _data_directory(endpoints) == folder / "postgres"
            assert folder.stat().st_mode & 0o777 == 0o710
            assert (folder / "postgres.password").stat().st_mode & 0o777 == 0o600
        with embedded_servers(folder) as endpoints:
            assert _data_directory(endpoints) == folder / "postgres"


@pytest.mark.usefixtures("keep_away_from_var")
def test_a_killed_parent_takes_its_servers_along_and_the_next_one_starts_at_once(folder: Path) -> None:
    from service.embedded import postgres

    command = [sys.executable, "-c", PARENT, str(folder), str(postgres.ROOT_HOME)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        orphans = children_of(parent.pid)
        assert {process.name() for process in orphans} >= {"postgres", "valkey-server"}
        parent.kill()
    with embedded_servers(folder) as endpoints, psycopg.connect(endpoints.migration_database_url) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
    assert eventually(lambda: not any(process.is_running() for process in orphans))
    assert not sockets(url).exists()


@pytest.mark.usefixtures("keep_away_from_var")
def test_a_server_that_dies_is_started_again_and_the_pool_finds_it(folder: Path) -> None:
    with embedded_servers(folder) as endpoints:
        database = PostgresDatabase(endpoints.database_url)
        database.ping()
        pid = int((_data_directory(endpoints) / "postmaster.pid").read_text().partition("\n")[0])
        os.kill(pid, signal.SIGKILL)
        broker = redis.Redis(unix_socket_path=urlsplit(endpoints.broker_url).path)
        os.kill(broker.info()["process_id"], signal.SIGKILL)

        def answers() -> bool:
            try:
                database.ping()
                broker.ping()
            except (Unavailable, redis.ConnectionError):  # nothing else may come out of an outage
                return False
            return int((_data_directory(endpoints) / "postmaster.pid").read_text().partition("\n")[0]) != pid

        assert eventually(answers)
        database.close()
        broker.close()


def _data_directory(endpoints: Endpoints) -> Path:
    with psycopg.connect(endpoints.migration_database_url) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
    assert row is not None
    return Path(row[0])
