"""Does a replay predict live runs? `python -m tests.benchmarks.replay_accuracy [JOB.jsonl ...] [--repeats 3] [--json]`.

Two policies run live, taking turns; each run records a trace. From every trace both policies are replayed. Goals: the median prediction of
a policy is within 10% of the median live throughput, also from the other policy's traces, and both are ranked as they are live. Policies
whose live runs overlap have no rank (`tied_live`): give others.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from engine.config import EngineConfig
from engine.lab.replay import Policy, replay
from engine.lab.trace import read_trace
from tests.benchmarks import live

GOAL = 0.10


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("jobs", nargs="*", type=Path, default=live.EXAMPLES, help="OpenAI batch files (default: the examples)")
    parser.add_argument("--policies", default="plain,fixed-8", help="two of plain, auto, fixed-K (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=None, help="only the first N")
    parser.add_argument("--max-sequences", type=int, default=None)
    parser.add_argument("--max-tokens", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    names = options.policies.split(",")
    loaded = live.load(options)
    requests = live.read_requests(options.jobs, loaded, max_tokens=options.max_tokens)[: options.lines]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    predictions: dict[tuple[str, str], list[float]] = {(source, name): [] for source in names for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for source in names if repeat % 2 == 0 else reversed(names):
                path = Path(folder) / "trace.jsonl"
                run = live.run(loaded, EngineConfig(max_sequences=options.max_sequences, trace=path, **settings(source)), requests, source)
                speeds[source].append(run.tokens_per_second)
                trace = read_trace(path)
                for name in names:
                    predictions[source, name].append(replay(trace, Policy.of(name, trace)).tokens_per_second)
    rows = []
    for (source, name), predicted in predictions.items():
        measured = median(speeds[name])
        error = median(predicted) / measured - 1.0
        rows.append({"trace of": source, "policy": name, "live": round(measured, 2), "predicted": round(median(predicted), 2)})
        rows[-1] |= {"error": round(error, 4)}
    order = sorted(names, key=lambda name: median(speeds[name]))
    slower, faster = order[0], order[-1]
    tied = max(speeds[slower]) >= min(speeds[faster])
    ranked = {source: sorted(names, key=lambda name: median(predictions[source, name])) == order for source in names}
    result = {
        "benchmark": "replay accuracy",
        "lines": len(requests),
        "rows": rows,
        "worst_error": max(abs(row["error"]) for row in rows),
        "tied_live": tied,
        "ranked_right_from": None if tied else ranked,
        "goal": GOAL,
        "pass": all(abs(row["error"]) <= GOAL for row in rows) and not tied and all(ranked.values()),
    }
    return live.report(result, as_json=options.as_json)


def settings(policy: str) -> dict[str, Any]:
    """The live engine's settings for a policy of the replay."""
    if policy == "plain":
        return {"drafter": "off"}
    return {"drafter": "auto", "fixed_drafts": int(policy.removeprefix("fixed-")) if policy.startswith("fixed-") else None}


if __name__ == "__main__":
    sys.exit(main())
