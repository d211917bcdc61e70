"""Rows 12, 16, 26 and 27 of the fault matrix: a full broker, an upload cut off, a full disk, prices and schema that change in mid-batch."""

from __future__ import annotations

import os
import resource
import signal
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import redis

from service.domain.account import FilePurpose
from service.domain.money import Rates
from service.errors import Unavailable
from service.usecases.files import FileIntake
from service.usecases.janitor import UploadOrphans
from tests.bad_input import MODEL
from tests.faults.cluster import Cluster, _forkserver, cluster
from tests.faults.test_outages import doomed, own_servers  # noqa: F401 - fixtures
from tests.integration.jobs import lines

LIMIT = 60_000


def test_the_broker_is_full(doomed, own_servers):  # noqa: F811 - the fixtures
    """It refuses every message; workers find the work by themselves."""
    path = own_servers.broker_url.removeprefix("redis+socket://")
    with redis.Redis(unix_socket_path=path) as client:
        before = client.config_get("maxmemory")["maxmemory"]
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(Unavailable, match="broker"):
                doomed.services.queue.wake(MODEL)
            with doomed.control():
                doomed.worker()
                assert doomed.ended(doomed.jobs.submit(lines(40))).completed == 40
        finally:
            client.config_set("maxmemory", before)


def upload_and_die(environment: dict[str, str], point: str) -> None:
    """A process in the place of the API's: it ends in the middle of the file, or between the object and its row."""
    from service.bootstrap import open_blobs, open_database
    from service.config import load_settings

    settings = load_settings(environment)
    intake = FileIntake(open_blobs(settings), "proj_default", max_bytes=1 << 20)
    intake.open("job.jsonl")
    intake.write(b"x" * 100_000)
    if point == "in the file":
        os.kill(os.getpid(), signal.SIGKILL)

    class Deadly:
        def begin(self) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    intake.save(Deadly(), purpose=FilePurpose.BATCH, expires_after=None)  # type: ignore[arg-type]
    open_database(settings).close()


@pytest.mark.parametrize("point", ["in the file", "before the row"])
def test_the_api_dies_in_an_upload(faulty: Cluster, point: str) -> None:
    process = _forkserver.Process(target=upload_and_die, args=(faulty.environment, point))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    database, blobs = faulty.services.database, faulty.services.blobs
    batch = faulty.jobs.submit(lines(2))  # its file has a row, and must stay
    visible = {info.key for info in blobs.list("files/")}
    assert len(visible) == (1 if point == "in the file" else 2), "half an object is never seen"
    assert blobs.discard_abandoned(timedelta(0)) == (1 if point == "in the file" else 0)
    patient = UploadOrphans()
    assert [patient.remove(database, blobs) for _ in range(2)] == [0, 0], "it may be on its way to its row"
    janitor = UploadOrphans(orphans_after=timedelta(0))
    assert janitor.remove(database, blobs) == 0
    assert janitor.remove(database, blobs) == (0 if point == "in the file" else 1)
    with faulty.control():
        faulty.worker()
        assert faulty.ended(batch).completed == 2


def test_the_disk_is_full(faulty: Cluster) -> None:
    """A limit on file sizes stands in for it: writes of segments fail in the middle, until there is room."""
    with faulty.control():
        worker = faulty.worker(standin__answer_bytes="20000", timing__commit_lines="16")
        pid = worker.process.pid
        assert pid is not None
        faulty.wait(lambda: _registered(faulty), "a worker")
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        batch = faulty.jobs.submit(lines(40))
        faulty.wait(lambda: "commit_waits" in faulty.log.read_text(), "a commit that finds no room")
        assert worker.poll() is None, "a full disk kills no worker"
        assert not faulty.committed(batch)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        assert faulty.ended(batch).completed == 40
    assert set(faulty.started().values()) == {1}, "nothing was computed twice"


def test_prices_and_schema_change_under_running_workers(database_url: str, owner_url: str, broker_url: str, tmp_path: Any) -> None:
    """A batch keeps the prices of its creation; columns and indexes that a newer version adds do not disturb an older worker."""
    where = {"database_url": database_url, "broker_url": broker_url, "blob_url": f"file://{tmp_path}/blobs"}
    with cluster(tmp_path, **where) as running, running.control():
        database = running.services.database
        batch = running.jobs.submit(lines(120))
        running.worker("old")
        running.wait(lambda: running.committed(batch), "a first commit")
        with database.begin() as uow:
            uow.ledger.set_prices({MODEL: Rates(10**12, 10**12, 10**12)})
        with psycopg.connect(owner_url) as owner:  # what an upgrade does while workers of the version before are at work
            for table in ("groups", "lines", "batches", "line_results", "workers", "outbox"):
                owner.execute(f"ALTER TABLE {table} ADD COLUMN newer text DEFAULT 'x' NOT NULL")
            owner.execute("CREATE INDEX ix_newer ON lines (batch_id, newer)")
        running.worker("new")
        dear = running.jobs.submit(lines(10))
        cheap, dear = running.ended(batch), running.ended(dear)
        assert cheap.price_version < dear.price_version
        with database.begin() as uow:
            old_price, new_price = (uow.ledger.batch_total(each.id).total / each.completed for each in (cheap, dear))
    assert new_price > 1000 * old_price


def _registered(running: Cluster) -> bool:
    with running.services.database.begin() as uow:
        return bool(uow.workers.live(timedelta(minutes=1)))
