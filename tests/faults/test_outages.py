"""Rows 9, 10, 13-15 and 17-19 of the fault matrix: broker, database and object store fail while the work goes on."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from service.adapters.schema import upgrade
from service.config import S3
from service.embedded import Endpoints, embedded_servers
from service.errors import Unavailable
from tests.contract.fault_proxy import FaultProxy, lose_reply, reset, slow_down
from tests.faults.cluster import Cluster, cluster
from tests.integration.jobs import lines


@pytest.fixture(scope="module")
def own_servers() -> Iterator[Endpoints]:
    """Servers that this module may kill; they start again by themselves."""
    with tempfile.TemporaryDirectory(prefix="longdraft-test-") as folder:
        Path(folder).chmod(0o711)
        with embedded_servers(Path(folder)) as endpoints:
            upgrade(endpoints.migration_database_url)
            yield endpoints


@pytest.fixture
def doomed(own_servers: Endpoints, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster on the servers that may be killed."""
    urls = {"database_url": own_servers.database_url, "broker_url": own_servers.broker_url, "blob_url": f"file://{tmp_path}/blobs"}
    with cluster(tmp_path, **urls) as running:
        yield running


def server(name: str, endpoints: Endpoints) -> psutil.Process:
    """The server process (of ours) that runs `name` on these sockets."""
    folder = endpoints.broker_url.removeprefix("redis+socket://").rpartition("/")[0]
    return next(
        child for child in psutil.Process().children() if name in child.name() and any(folder in argument for argument in child.cmdline())
    )


class Dropping:
    """A queue whose messages never arrive."""

    def wake(self, model: str) -> None:
        """Lost."""

    def ping(self) -> None: ...


class Down:
    """A queue whose broker is away."""

    def wake(self, model: str) -> None:
        raise Unavailable("no broker")

    def ping(self) -> None:
        raise Unavailable("no broker")


class Repeating:
    """Sends every message ten times."""

    def __init__(self, inner) -> None:
        self.inner, self.sent = inner, 0

    def wake(self, model: str) -> None:
        for _ in range(10):
            self.inner.wake(model)
            self.sent += 1

    def ping(self) -> None: ...


@pytest.mark.parametrize("queue", [Dropping(), Down()], ids=["lost", "refused"])
def test_no_message_ever_arrives(faulty, queue):
    """Hints only save time: workers look at the database by themselves."""
    with faulty.control(queue):
        batch = faulty.jobs.submit(lines(40))
        faulty.worker()
        assert faulty.ended(batch).completed == 40


def test_every_message_arrives_ten_times(faulty):
    queue = Repeating(faulty.services.queue)
    with faulty.control(queue):
        faulty.worker("one")
        faulty.worker("two")
        batch = faulty.jobs.submit(lines(80))
        assert faulty.ended(batch).completed == 80
    assert queue.sent >= 10
    assert set(faulty.started().values()) == {1}


def test_the_submitter_dies_right_after_its_transaction(faulty):
    """The promise is in the outbox: a control process that starts later keeps it."""
    batch = faulty.jobs.submit(lines(20))
    faulty.worker()
    with faulty.control():
        assert faulty.ended(batch).completed == 20


def test_a_worker_needs_no_broker(faulty):
    """Neither to start, nor to work, nor to leave in good order."""
    with faulty.control(Down()):
        worker = faulty.worker(broker_url=f"redis+socket://{faulty.folder}/nothing.sock")
        assert faulty.ended(faulty.jobs.submit(lines(40))).completed == 40
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0


def test_the_broker_is_flushed_in_mid_batch(doomed, own_servers):
    with doomed.control():
        batch = doomed.jobs.submit(lines(120))
        doomed.worker()
        doomed.wait(lambda: doomed.committed(batch), "a first commit")
        path = own_servers.broker_url.removeprefix("redis+socket://")
        with redis.Redis(unix_socket_path=path) as client:
            client.flushall()
        assert doomed.ended(batch).completed == 120


def test_the_broker_is_killed_and_comes_back_empty(doomed, own_servers):
    with doomed.control():
        batch = doomed.jobs.submit(lines(120))
        doomed.worker()
        doomed.wait(lambda: doomed.committed(batch), "a first commit")
        server("valkey", own_servers).kill()
        assert doomed.ended(batch).completed == 120
        again = doomed.jobs.submit(lines(10))
        assert doomed.ended(again).completed == 10


def test_database_connections_are_cut_again_and_again(doomed, own_servers):
    """Also in the middle of commits, whose fate is then unknown until it is looked up."""
    stop, cuts = threading.Event(), []

    def cut() -> None:
        with psycopg.connect(own_servers.migration_database_url, autocommit=True) as admin:
            while not stop.wait(0.25):
                killed = admin.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'longdraft'"
                ).fetchone()
                cuts.append(killed)

    with doomed.control():
        batch = doomed.jobs.submit(lines(200))
        doomed.worker()
        thread = threading.Thread(target=cut)
        thread.start()
        try:
            doomed.wait(lambda: len(cuts) >= 12, "a dozen cuts")
        finally:
            stop.set()
            thread.join()
        assert doomed.ended(batch).completed == 200


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "crash"])
def test_the_database_restarts_in_mid_batch(doomed, own_servers, how):
    with doomed.control():
        batch = doomed.jobs.submit(lines(200))
        doomed.worker()
        doomed.wait(lambda: doomed.committed(batch), "a first commit")
        server("postgres", own_servers).send_signal(how)
        assert doomed.ended(batch).completed == 200


def test_the_object_store_fails_in_every_way(database_url, broker_url, tmp_path, s3_settings: S3, s3_bucket, s3_url):
    """503s, resets and replies that never come, for segments and for output files: delays, and nothing else."""
    with FaultProxy(s3_url) as proxy:
        values = {**{k: str(v) for k, v in s3_settings.model_dump(exclude_none=True).items()}, "endpoint_url": proxy.url}
        where = {"database_url": database_url, "broker_url": broker_url, "blob_url": f"s3://{s3_bucket}/jobs"}
        with cluster(tmp_path, **where, s3=values) as running, running.control():
            batch = running.jobs.submit(lines(100))
            for fault in (slow_down, reset, lose_reply):
                proxy.once("PUT", "segments/", fault, times=4)
                proxy.once("PUT", "outputs/", fault)
                proxy.once("GET", "segments/", fault)
            running.worker()
            assert running.ended(batch).completed == 100
            assert not [fault for fault in proxy.faults if fault[0] == "PUT" and fault[1] == "segments/"]
