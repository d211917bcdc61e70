"""What a running `longdraft up` tells the other commands of its machine."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STATE_FILE = "server.json"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Addresses and key, in a file of the data folder that only its owner can read."""

    url: str
    api_key: str
    pid: int
    database_url: str
    migration_database_url: str | None
    broker_url: str
    blob_url: str | None

    def write(self, data_dir: Path) -> None:
        write_private(data_dir / STATE_FILE, json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(data_dir: Path) -> RunningServer | None:
        """None where no `up` runs on this folder."""
        try:
            found = RunningServer(**json.loads((data_dir / STATE_FILE).read_text(encoding="utf-8")))
            os.kill(found.pid, 0)
        except (OSError, ValueError, TypeError):
            return None
        return found

    @staticmethod
    def remove(data_dir: Path) -> None:
        with suppress(OSError):
            (data_dir / STATE_FILE).unlink()


def write_private(path: Path, text: str) -> None:
    """Writes the whole file or nothing, mode 0600 from the first byte."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600, exist_ok=False)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
