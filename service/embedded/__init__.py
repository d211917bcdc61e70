"""A real PostgreSQL and a real Valkey out of wheels, run as private children of this process.

PostgreSQL listens on a unix socket in a private folder only, with SCRAM passwords; Valkey likewise. As root both run as `nobody`,
since PostgreSQL refuses to be root, in a folder that user can reach. Both end when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.embedded.postgres import run_postgres
from service.embedded.process import UNPRIVILEGED_USER
from service.embedded.valkey import run_valkey
from service.errors import Conflict

LONGEST_TEMPORARY = 64


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the embedded servers answer. The runtime role may not rewrite the ledger; the migration role owns the schema."""

    database_url: str
    migration_database_url: str
    broker_url: str


@contextlib.contextmanager
def embedded_servers(data_dir: Path) -> Iterator[Endpoints]:
    """Starts both servers and stops them at the end of the block. What PostgreSQL holds survives in `data_dir`.

    A server that dies meanwhile is started again at the same address.

    Raises:
        Conflict: another process runs on this folder.
        Unavailable: a server did not start; the message ends with its last log lines.
    """
    data_dir = data_dir.absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(data_dir), contextlib.ExitStack() as stack:
        owner = pwd.getpwnam(UNPRIVILEGED_USER) if os.geteuid() == 0 else None
        sockets = stack.enter_context(_socket_folder(data_dir, owner))
        database = stack.enter_context(run_postgres(data_dir, sockets, owner))
        broker = stack.enter_context(run_valkey(data_dir, sockets, owner))
        yield Endpoints(*database, broker)


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"Another Longdraft is running on {data_dir}; stop it or choose another --data-dir.") from None
        yield


@contextlib.contextmanager
def _socket_folder(data_dir: Path, owner: pwd.struct_passwd | None) -> Iterator[Path]:
    """A private folder with a short path: a socket's name has room for 107 bytes, and data and temporary folders may lie deep."""
    note = data_dir / "sockets.location"
    if note.exists():  # its supervisor was killed
        shutil.rmtree(note.read_text().strip(), ignore_errors=True)
    parent = None if len(tempfile.gettempdir()) < LONGEST_TEMPORARY else "/tmp"  # noqa: S108 - mkdtemp makes it private
    with tempfile.TemporaryDirectory(prefix="longdraft-", dir=parent, ignore_cleanup_errors=True) as folder:
        note.write_text(f"{folder}\n")
        if owner:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        yield Path(folder)
    note.unlink(missing_ok=True)
