"""Longdraft beside what a user would pick instead, one command, resumable:
`python -m tests.benchmarks.offline_engines DATA [--out build/offline] [--repeats 3] [--only mixed] [--json]`.

DATA holds bench_mixed.jsonl, bench_copy.jsonl and bench_long.jsonl. Peers are installed where they are missing; references and sweeps are
made once and kept (in the cache folder and in build/peers); a comparison that is done leaves DATA's name .json and .png in `--out` and is
not done again, so after an interruption the same command goes on. Only peers within 15% of the fastest are repeated; the others are tried
once at each batch size, and stopped at twice the fastest peer's time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.bench.peers import FOLDER
from tests.benchmarks.peers.install import ENVIRONMENTS, install

OURS = ("drafter=auto", "drafter=off")
FASTEST_FIRST = ("openvino", "vllm")
"""So that trials of what is slower are stopped early."""


@dataclass(frozen=True)
class Comparison:
    """`goal`: our best median against the best peer's; `of_bound`: our best against the bound, where there is such a goal."""

    job: str
    lines: int | None
    goal: float
    sizes: str
    of_bound: float | None = None


COMPARISONS = {
    "mixed": Comparison("bench_mixed.jsonl", None, 1.05, "32,64", 0.90),
    "copy": Comparison("bench_copy.jsonl", None, 1.15, "16,32"),
    "copy-8": Comparison("bench_copy.jsonl", 8, 1.6, "8"),
    "copy-1": Comparison("bench_copy.jsonl", 1, 2.0, "1"),
    "long": Comparison("bench_long.jsonl", None, 2.0, "24"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/offline"))
    parser.add_argument("--peers", type=Path, default=Path(FOLDER))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help=f"names that contain this, of {', '.join(COMPARISONS)}")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    for peer in ENVIRONMENTS:
        install(peer, options.peers)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, comparison in COMPARISONS.items():
        if options.only in name:
            report = done(name, options.out) or compare(name, comparison, options)
            rows.append(judge(name, comparison, report))
            if not options.as_json:
                print(json.dumps(rows[-1]), flush=True)
    if options.as_json:
        print(json.dumps({"benchmark": "offline engines", "rows": rows, "pass": all(row["pass"] for row in rows)}))
    return int(not all(row["pass"] for row in rows))


def done(name: str, out: Path) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def compare(name: str, comparison: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    """One run of `longdraft bench`, kept when it is whole."""
    command = [
        sys.executable,
        "-m",
        "service.cli.main",
        "bench",
        str(options.data / comparison.job),
        "--json",
        "--peer-drafts",
        "--contenders",
    ]
    command += ["--repeats", str(options.repeats), "--batch-sizes", comparison.sizes, "--peers", str(options.peers)]
    command += ["--plot", str(options.out / f"{name}.png")]
    for config in OURS:
        command += ["--config", config]
    for peer in (*sorted(ENVIRONMENTS, key=FASTEST_FIRST.index), "transformers"):
        command += ["--compare", peer]
    if comparison.lines is not None:
        command += ["--lines", str(comparison.lines)]
    print(f"==> {name}: {' '.join(command[2:])}", file=sys.stderr, flush=True)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    path = options.out / f"{name}.json"
    partial = path.with_suffix(".part")
    partial.write_text(output, encoding="utf-8")
    partial.rename(path)
    return json.loads(output)


def judge(name: str, comparison: Comparison, report: dict[str, Any]) -> dict[str, Any]:
    """Our best configuration against the peers' best, by medians."""
    speeds = {run["name"]: run["tokens_per_second"]["median"] for run in report["runs"]}
    ours = max((run for run in report["runs"] if run["kind"] == "longdraft"), key=lambda run: speeds[run["name"]])
    best = max((run for run in report["runs"] if run["kind"] != "longdraft" and not run["stopped"]), key=lambda run: speeds[run["name"]])
    ratio = speeds[ours["name"]] / speeds[best["name"]]
    reached = ratio >= comparison.goal and (comparison.of_bound is None or ours["of_bound"] >= comparison.of_bound)
    return {
        "comparison": name,
        "ours": {key: ours[key] for key in ("name", "tokens_per_second", "of_bound", "peak_rss_bytes", "identical_to_reference")},
        "best_peer": {key: best[key] for key in ("name", "tokens_per_second", "peak_rss_bytes", "identical_to_reference")},
        "ratio": round(ratio, 3),
        "goal": comparison.goal,
        "bound": report["bound"]["tokens_per_second"],
        "pass": reached,
    }


if __name__ == "__main__":
    sys.exit(main())
