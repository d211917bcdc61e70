"""`make acceptance`: runs the registered checks and writes one JSON row each to build/acceptance.jsonl.

A row: name, command, commit, figure, goal, pass (null where the check could not run here; `figure` then says why). Rows of checks that
are not run this time stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.acceptance.checks import CHECKS, DATA, ROOT, Check

ROWS = ROOT / "build" / "acceptance.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the checks whose name contains this")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the benchmark jobs")
    parser.add_argument("--list", action="store_true", help="print the names and goals")
    options = parser.parse_args()
    chosen = [check for check in CHECKS if options.only in check.name]
    if options.list:
        for check in chosen:
            print(f"{check.name}\t{check.goal}")
        return 0
    if not chosen:
        print(f"No check's name contains {options.only!r}; --list shows them.", file=sys.stderr)
        return 2
    rows = {row["name"]: row for row in _rows()}
    for check in chosen:
        print(f"==> {check.name}: {check.goal}", flush=True)
        row = run(check, options.data)
        rows[check.name] = row
        _save(rows)
        print(f"    {'skipped' if row['pass'] is None else 'pass' if row['pass'] else 'FAIL'}: {json.dumps(row['figure'])}", flush=True)
    return int(any(rows[check.name]["pass"] is False for check in chosen))


def run(check: Check, data: Path) -> dict[str, Any]:
    """Carries out one check and makes its row."""
    command = [part.replace("{data}", str(data)) for part in check.command]
    shown = shlex.join(["python", *command[1:]] if command[0] == sys.executable else command)
    row = {"name": check.name, "command": shown, "commit": commit(), "figure": None, "goal": check.goal, "pass": None}
    missing = [name for name in check.needs if not (data / name).exists()]
    if missing:
        return {**row, "figure": f"needs {', '.join(missing)} in {data}; name the folder with --data"}
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=check.seconds, check=False)
    except subprocess.TimeoutExpired:
        return {**row, "figure": f"not finished after {check.seconds} s", "pass": False}
    figure, passed = check.judge(done.stdout, done.returncode)
    if not passed:
        print(done.stdout[-3000:] + done.stderr[-3000:], file=sys.stderr)
    return {**row, "figure": figure, "pass": passed, "seconds": round(time.monotonic() - started, 1)}


def commit() -> str:
    """The commit that is checked, marked if the tree differs from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def _save(rows: dict[str, dict[str, Any]]) -> None:
    ROWS.parent.mkdir(exist_ok=True)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
