"""Does speculation ever lose? `python -m tests.benchmarks.speculation_pays [JOB.jsonl ...] [--sizes 1,8,64] [--repeats 3] [--json]`.

For every batch size, paired live runs: plain decoding, the planner, a fixed length of 8, and plain once more, in an order that turns from
repeat to repeat. The planner's ratio to the better of plain and fixed, against 0.98 less half the spread of plain against plain (A/A). The
cost model's error is that of its predictions before it has seen a step, from the planner's traces: at most 5%, or that spread. Beside it is
the error of the best that looking back could do (the same steps' own spread around a formula fitted to all of them).

Then the same in virtual time, on the machine that the traces describe, where nothing is noise: there the planner must not lose 2%.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from engine.checkpoints import LoadedModel
from engine.config import EngineConfig
from engine.lab.machine import RecordedMachine
from engine.lab.replay import Policy, replay
from engine.lab.trace import Trace, read_trace
from engine.types import Request
from service.cli.bench.statistics import median_interval
from tests.benchmarks import live

GOAL, MODEL_GOAL, FIXED = 0.98, 0.05, 8
LEAST_LINES, LEAST_TRACED = 8, 32
"""A single line may end after a few tokens, and then says nothing. In virtual time nothing is noise, but drafts have luck: two steps of a
hundred are as much as the goal allows.
"""
LIVE: dict[str, dict[str, Any]] = {
    "plain": {"drafter": "off"},
    "auto": {"drafter": "auto"},
    "fixed": {"drafter": "auto", "fixed_drafts": FIXED},
    "again": {"drafter": "off"},
}


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("jobs", nargs="*", type=Path, default=live.EXAMPLES, help="OpenAI batch files (default: the examples)")
    parser.add_argument("--sizes", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    loaded = live.load(options)
    requests = in_turn([live.read_requests([job], loaded, max_tokens=options.max_tokens) for job in options.jobs])
    rows, ratios, spreads, errors, spread_errors = [], [], [], [], []
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            speeds, trace = measure(loaded, requests, size, options.repeats, Path(folder))
        paired = [auto / max(plain, fixed) for auto, plain, fixed in zip(speeds["auto"], speeds["plain"], speeds["fixed"], strict=True)]
        ratios += paired
        spreads += [again / plain for again, plain in zip(speeds["again"], speeds["plain"], strict=True)]
        errors.append(trace.model_error() or 0.0)
        spread_errors.append(own_spread(trace))
        rows.append(
            {"sequences": size, **{name: round(median(values), 2) for name, values in speeds.items()}, "ratio": round(median(paired), 4)}
        )
        rows[-1] |= virtual(trace) | {"model_error": round(errors[-1], 4)}
    half = aa_half_width(spreads)
    ratio, error, spread = median(ratios), median(errors), median(spread_errors)
    worst = min(row["virtual_ratio"] for row in rows)
    return live.report(
        {
            "benchmark": "speculation pays",
            "rows": rows,
            "median_ratio": round(ratio, 4),
            "ratio_interval": median_interval(ratios).row(),
            "aa_half_width": round(half, 4),
            "goal": round(GOAL - half, 4),
            "model_error_median": round(error, 4),
            "model_error_of_hindsight": round(spread, 4),
            "virtual_worst_ratio": worst,
            "pass": ratio >= GOAL - half and error <= max(MODEL_GOAL, half) and worst >= GOAL,
        },
        as_json=options.as_json,
    )


def in_turn(jobs: list[list[Request]]) -> list[Request]:
    """The first of each job, the second of each, and so on: so few lines are of every kind, too."""
    return [request for row in zip_longest(*jobs) for request in row if request is not None]


def measure(loaded: LoadedModel, requests: list[Request], size: int, repeats: int, folder: Path) -> tuple[dict[str, list[float]], Trace]:
    """Tokens a second by configuration and repeat, and the trace of one more run of the planner: writing it takes time, too."""
    lines = live.copies(requests, max(size, LEAST_LINES))
    speeds: dict[str, list[float]] = {name: [] for name in LIVE}
    names = list(LIVE)
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            config = EngineConfig(max_sequences=size, **LIVE[name])
            speeds[name].append(live.run(loaded, config, lines, f"{size} sequences, {name}").tokens_per_second)
    trace = folder / "auto.jsonl"
    lines = live.copies(requests, max(size, LEAST_TRACED))
    live.run(loaded, EngineConfig(max_sequences=size, trace=trace, **LIVE["auto"]), lines, f"{size} sequences, trace")
    return speeds, read_trace(trace)


def virtual(trace: Trace) -> dict[str, float]:
    """The three policies on the machine of the trace."""
    machine = RecordedMachine(trace)
    plain, auto, fixed = (
        replay(trace, Policy.of(name, trace), machine=machine).tokens_per_second for name in ("plain", "auto", f"fixed-{FIXED}")
    )
    return {"virtual_auto": round(auto, 2), "virtual_ratio": round(auto / max(plain, fixed), 4)}


def own_spread(trace: Trace) -> float:
    """Median relative distance of the steps from the formula that fits them best, all seen at once."""
    machine = RecordedMachine(trace)
    return median(abs(machine.step(step.load) - step.seconds) / step.seconds for step in trace.steps)


def aa_half_width(ratios: list[float]) -> float:
    """Half of the range that the middle 90% of plain against plain cover."""
    ordered = sorted(ratios)
    cut = len(ordered) // 20
    return (ordered[len(ordered) - 1 - cut] - ordered[cut]) / 2


if __name__ == "__main__":
    sys.exit(main())
