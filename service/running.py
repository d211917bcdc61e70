"""What a running `longdraft up` tells the other commands of its machine."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STATE_FILE = "server.json"


BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Addresses and key, in a file of the data folder that only its owner can read.

    The file also says when the process was born: one that was killed leaves its file behind, and its number may by then be another's
    (in a container that starts again it mostly is).
    """

    url: str
    api_key: str
    pid: int
    database_url: str
    migration_database_url: str | None
    broker_url: str
    blob_url: str | None

    def write(self, data_dir: Path) -> None:
        write_private(data_dir / STATE_FILE, json.dumps({**asdict(self), "born": birth(self.pid)}, indent=1))

    @staticmethod
    def read(data_dir: Path) -> RunningServer | None:
        """None where no `up` runs on this folder."""
        try:
            values = json.loads((data_dir / STATE_FILE).read_text(encoding="utf-8"))
            born = values.pop("born")
            found = RunningServer(**values)
            alive = birth(found.pid) == born
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return found if alive else None

    @staticmethod
    def remove(data_dir: Path) -> None:
        with suppress(OSError):
            (data_dir / STATE_FILE).unlink()


def birth(pid: int) -> str:
    """The boot and its tick at which a process started: no two processes of one number share them. Raises OSError where it has ended."""
    # proc_pid_stat(5): the second field, the name, may hold blanks and parentheses; the third is the state, the 22nd the start.
    state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    if state in ("Z", "X"):
        raise ProcessLookupError(f"Process {pid} has ended.")
    return f"{BOOT.read_text(encoding='ascii').strip()}/{fields[18]}"


def write_private(path: Path, text: str) -> None:
    """Writes the whole file or nothing, mode 0600 from the first byte."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600, exist_ok=False)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
