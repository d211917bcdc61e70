"""What a stranger does: clone into a new folder, with an empty cache, `make demo` twice, `.ci/run`. Prints the wall times as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECOND_DEMO_SECONDS = 120.0
TEST_SECONDS = 1200.0


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="longdraft-clone-") as folder:
        Path(folder).chmod(0o711)  # as root the embedded PostgreSQL runs as another user, who must be able to walk in
        clone = Path(folder) / "longdraft"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("LONGDRAFT_", "VIRTUAL_ENV", "MAKE", "MFLAGS"))
        }
        environment["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        environment["XDG_DATA_HOME"] = str(Path(folder) / "data")
        figures = {
            "install_seconds": timed(["make", ".venv/.installed"], clone, environment),
            "first_demo_seconds": timed(["make", "demo"], clone, environment),
            "second_demo_seconds": timed(["make", "demo"], clone, environment),
            "ci_seconds": timed([".ci/run"], clone, environment),
        }
    good = figures["second_demo_seconds"] < SECOND_DEMO_SECONDS and figures["install_seconds"] + figures["ci_seconds"] < TEST_SECONDS
    print(json.dumps({**figures, "pass": good}))
    return 0 if good else 1


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Wall seconds of a command that must succeed; its output goes to stderr."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode:
        print(json.dumps({"failed": " ".join(command), "exit_code": done.returncode, "pass": False}))
        sys.exit(1)
    return round(time.monotonic() - started, 1)


if __name__ == "__main__":
    sys.exit(main())
