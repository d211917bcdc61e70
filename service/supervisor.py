"""`longdraft up`: the whole service on one machine.

The order is servers (PostgreSQL, Valkey; or the ones the settings name), schema, API key, control process and API, and then workers, which
exist only while groups are due. Everything ends in the reverse order, so that a worker can still commit what it has finished.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.children import Child, describe_exit, stop_all
from service.config import Settings
from service.errors import ConfigError, Unavailable
from service.gpu_workers import pinned, visible_gpus
from service.running import RunningServer, write_private
from service.worker_pool import Workers, release_worker

if TYPE_CHECKING:
    from service.bootstrap import Services

POLL_SECONDS = 0.25
"""How often due groups and dead children are looked for: one indexed query, and the latency of the first worker's start."""

API_READY_SECONDS = 60.0
DEFAULT_PROJECT = "default"

Say = Callable[[str], None]


@contextmanager
def deployment(settings: Settings) -> Iterator[Settings]:
    """The settings with every URL filled in, for as long as the embedded servers that fill the gaps are running.

    Raises ConfigError where the data folder cannot be made or written to.
    """
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.data_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f"Cannot keep data in {settings.data_dir}: {error.strerror}. Choose another folder: --data-dir, or LONGDRAFT_DATA_DIR.",
            param="data_dir",
        ) from None
    settings = settings.model_copy(update={"blob_url": settings.blob_url or (settings.data_dir.resolve() / "blobs").as_uri()})
    if settings.database_url and settings.broker_url:
        yield settings
        return
    from service.embedded import embedded_servers

    with embedded_servers(settings.data_dir) as servers:
        own_database = settings.database_url is None
        yield settings.model_copy(
            update={
                "database_url": servers.database_url if own_database else settings.database_url,
                "migration_database_url": servers.migration_database_url if own_database else settings.migration_database_url,
                "broker_url": settings.broker_url or servers.broker_url,
            }
        )


def migrate(settings: Settings) -> None:
    """Brings the schema to its newest revision."""
    from service.adapters.schema import upgrade

    url = settings.migration_database_url or settings.database_url
    assert url is not None
    upgrade(url)


def ensure_key(services: Services) -> str:
    """The key that `up` prints: LONGDRAFT_API_KEY if set, else one that is made once and kept in the data folder (mode 0600)."""
    from service.usecases.keys import register_key

    settings = services.settings
    path = settings.data_dir / "api_key"
    secret = settings.api_key or (path.read_text(encoding="ascii").strip() if path.exists() else None)
    if secret is None:
        secret = f"ld-{secrets.token_urlsafe(32)}"
        write_private(path, secret + "\n")
    register_key(services.database, DEFAULT_PROJECT, secret, "longdraft up", pepper=settings.key_pepper)
    return secret


def listen(host: str, port: int) -> socket.socket:
    """The API's socket, bound before anything else starts. The supervisor keeps it, so clients wait while the API restarts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except OSError as error:
        server.close()
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port.", param="port") from None
    server.listen(512)
    return server


def child_environment(settings: Settings) -> dict[str, str]:
    """This process's environment with the deployment's addresses: children read their settings the way everyone does."""
    named = {
        "LONGDRAFT_DATA_DIR": settings.data_dir,
        "LONGDRAFT_DATABASE_URL": settings.database_url,
        "LONGDRAFT_BROKER_URL": settings.broker_url,
        "LONGDRAFT_BLOB_URL": settings.blob_url,
        "LONGDRAFT_HOST": settings.host,
    }
    environment = {**os.environ, **{name: str(value) for name, value in named.items()}, "PYTHONUNBUFFERED": "1"}
    for secret in ("LONGDRAFT_MIGRATION_DATABASE_URL", "LONGDRAFT_API_KEY"):
        environment.pop(secret, None)  # no child changes the schema or calls the API
    return environment


@dataclass(slots=True)
class Supervisor:
    """Keeps API and control process running and workers in proportion to the work."""

    services: Services
    permanent: list[Child]
    workers: Workers
    say: Say

    def run(self, stop: threading.Event) -> None:
        for child in self.permanent:
            child.start()
        while not stop.wait(POLL_SECONDS):
            self.step()

    def step(self) -> None:
        for child in self.permanent:
            self._restart(child)
        self.workers.reap()
        try:
            with self.services.database.begin() as uow:
                due = sum(uow.watch.due().values())
        except Unavailable:
            return  # the database is restarting; children handle that themselves
        self.workers.fit(due)

    def close(self) -> None:
        """Workers first: they commit what is finished and release the rest. Then API and control process."""
        grace = self.services.settings.timing.shutdown_grace
        stop_all(self.workers.live.values(), grace)
        self.workers.live.clear()
        stop_all(reversed(self.permanent), grace)

    def _restart(self, child: Child) -> None:
        status = child.ended()
        now = time.monotonic()
        if status is not None:
            pause = child.backoff.failed(now, now - child.started)
            self.say(f"{child.name} ended with {describe_exit(status)}; again in {pause:.1f} s. {child.last_words()} (see {child.log})")
        elif child.process is None and now >= child.backoff.not_before:
            child.start()


@contextmanager
def running_service(settings: Settings, *, stop: threading.Event, say: Say) -> Iterator[RunningServer]:
    """Everything up and answering; leaving the block stops it all. The supervision itself runs in a thread of this process.

    Raises:
        ConfigError: the port is taken, or an `up` runs on this data folder already.
        Unavailable: a part did not start; the message says which, and where its log is.
    """
    other = RunningServer.read(settings.data_dir)
    if other is not None:
        raise ConfigError(f"Longdraft is already up on {settings.data_dir}: {other.url}, pid {other.pid}. Choose another --data-dir.")
    with ExitStack() as stack:
        server_socket = listen(settings.host, settings.port)
        stack.callback(server_socket.close)
        settings = stack.enter_context(deployment(settings))
        migrate(settings)
        from service.bootstrap import open_services

        services = stack.enter_context(open_services(settings))
        key = ensure_key(services)
        supervisor = _supervisor(services, server_socket, say)
        thread = threading.Thread(target=_supervise, args=(supervisor, stop, say), name="supervisor")
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        running = _describe(settings, server_socket, key)
        _wait_until_ready(running.url, thread, supervisor, stop)
        running.write(settings.data_dir)
        stack.callback(RunningServer.remove, settings.data_dir)
        yield running


def _supervise(supervisor: Supervisor, stop: threading.Event, say: Say) -> None:
    """Starts the children and ends them in one and the same thread: Linux tells a child that its parent died when the *thread* ends that
    started it."""
    try:
        supervisor.run(stop)
    except Exception as error:
        say(f"the supervisor failed: {error!r}")
        raise
    finally:
        stop.set()  # never stay up half alive
        supervisor.close()


def _supervisor(services: Services, server_socket: socket.socket, say: Say) -> Supervisor:
    settings = services.settings
    environment = child_environment(settings)
    logs = settings.data_dir / "logs"

    gpus = visible_gpus()

    def child(name: str, *arguments: str, place: int, log: str | None = None, pass_fds: tuple[int, ...] = ()) -> Child:
        """`place`: which of the ports from `ops_port` on is its own."""
        command = [sys.executable, "-m", "service.cli.main", *arguments, "--parent", str(os.getpid())]
        ops = {"LONGDRAFT_OPS_PORT": str(settings.ops_port + place)} if settings.ops_port is not None else {}
        return Child(name, command, {**environment, **ops}, logs / f"{log or name}.log", pass_fds)

    def worker(worker_id: str, slot: int) -> Child:
        made = child(worker_id, "worker", "--id", worker_id, "--exit-when-idle", log="worker", place=2 + slot)
        if gpus:
            made.environment = pinned(made.environment, gpus[slot % len(gpus)])
        return made

    def release(worker_id: str) -> None:
        release_worker(services.database, worker_id, say)

    fd = server_socket.fileno()
    permanent = [child("control", "control", place=1), child("api", "api", "--fd", str(fd), place=0, pass_fds=(fd,))]
    return Supervisor(services, permanent, Workers(settings.max_workers, worker, release, say), say)


def _describe(settings: Settings, server_socket: socket.socket, key: str) -> RunningServer:
    assert settings.database_url is not None
    assert settings.broker_url is not None
    port = server_socket.getsockname()[1]
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host  # noqa: S104 - reached from this machine
    return RunningServer(
        url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        api_key=key,
        pid=os.getpid(),
        database_url=settings.database_url,
        migration_database_url=settings.migration_database_url,
        broker_url=settings.broker_url,
        blob_url=settings.blob_url,
    )


def _wait_until_ready(url: str, thread: threading.Thread, supervisor: Supervisor, stop: threading.Event) -> None:
    """Until /healthz answers 200. The socket accepts from the start, so a time-out only means: not yet."""
    import httpx

    api = supervisor.permanent[-1]
    deadline = time.monotonic() + API_READY_SECONDS
    while time.monotonic() < deadline and thread.is_alive() and not stop.is_set():
        try:
            if httpx.get(f"{url}/healthz", timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.05)
        if api.backoff.failures >= 3:
            break
    if stop.is_set() and thread.is_alive():
        raise Unavailable("Stopped before the API was ready.")
    raise Unavailable(f"The API did not become ready. {api.last_words()} See {api.log}.")
