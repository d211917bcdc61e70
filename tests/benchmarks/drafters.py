"""Which drafter pays, and does `auto` know? `python -m tests.benchmarks.drafters [JOB.jsonl ...] [--out DIR] [--plot FILE.png]`.

Tokens a second end to end at 1, 8 and 64 sequences, on jobs (the first counts as unseen prompts) and on 300 generated prompts that are
nearly the same: without drafts, with n-gram, the suffix lookup over the job, the same lookup cold (a request's own text alone), the
trained drafter that `auto` finds or `--drafter` names, and `auto`, the portfolio. Live runs, each in a fresh engine, in an order that turns
from repeat to repeat; ratios are of runs of one repeat, with intervals of their order statistics. Plain decoding beside itself (A/A) says
what a ratio is worth. Then draft caps of 4 to 64 with a histogram of the draft lengths that were chosen.

Goals: `auto` within 2% of the best single drafter everywhere (less half the A/A spread); the trained drafter 1.15 times plain decoding on
the first job at one sequence; the lookup over the job twice the cold one on the generated prompts, in accepted drafts a step and in tokens
a second. Every run is kept in DIR: started again, the benchmark goes on.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from engine.checkpoints import LoadedModel
from engine.config import EngineConfig
from engine.drafters.builtin import TEXT_DRAFTERS
from engine.drafters.sources import find_automatic
from engine.drafters.suffix import SuffixDrafter
from engine.lab.trace import read_trace
from engine.tokenizer import Tokenizer
from engine.types import Request, SamplingParams
from service.cli.bench.statistics import Interval, ratio
from tests.benchmarks import live
from tests.benchmarks.speculation_pays import aa_half_width

PLAIN, AGAIN, COLD, AUTO = "none", "none again", "suffix cold", "auto"
TEMPLATES = "templates"
WITHIN, OVER_PLAIN, OVER_COLD = 0.98, 1.15, 2.0
CAPS = (4, 8, 16, 32, 64)
BINS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Lower ends of the histogram's bins of chosen lengths."""
SHARES = {1: 1 / 16, 8: 1 / 4}
"""Of a job's lines, what is run at so many sequences: there a line takes longer."""


class ColdSuffix(SuffixDrafter):
    """The lookup without the job: what a request's own text holds."""

    def remember(self, template: str | None, tokens: list[int]) -> None:
        """Remembers nothing."""


@dataclass(frozen=True)
class Setting:
    """What makes two runs comparable; `drafters` by the name of their row: (model, EngineConfig's fields)."""

    jobs: dict[str, list[Request]]
    sizes: tuple[int, ...]
    repeats: int
    drafters: dict[str, tuple[LoadedModel, dict[str, Any]]]
    about: str

    def lines(self, job: str, size: int) -> list[Request]:
        requests = self.jobs[job]
        count = max(size, 2, math.ceil(len(requests) * SHARES.get(size, 1.0)))
        return live.copies(requests, count) if count > len(requests) else requests[:count]


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("jobs", nargs="*", type=Path, default=live.EXAMPLES[:2], help="OpenAI batch files (default: examples)")
    parser.add_argument("--drafter", type=Path, help="folder of the trained drafter (default: what `auto` finds)")
    parser.add_argument("--sizes", default="1,8,64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lines", type=int, default=64, help="of every job; of the generated one 300 / 64 times as many")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer; of the generated job a third")
    parser.add_argument("--out", type=Path, default=Path("build/drafters"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    loaded = live.load(options)
    options.out.mkdir(parents=True, exist_ok=True)
    TEXT_DRAFTERS["cold"] = ColdSuffix
    try:
        with tempfile.TemporaryDirectory() as place:
            packed = loaded if options.drafter is None else live.with_drafters(loaded, [options.drafter], Path(place))
            setting = make_setting(options, loaded, packed)
            runs, caps = measure(setting, options.out / "runs.jsonl")
    finally:
        del TEXT_DRAFTERS["cold"]
    result = judge(setting, runs) | {"caps": caps}
    (options.out / "drafters.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.plot is not None:
        plot(result, options.plot)
    if not options.as_json:
        print_caps(caps)
        result = {name: value for name, value in result.items() if name != "caps"}
    return live.report(result, as_json=options.as_json)


def make_setting(options: Any, loaded: LoadedModel, packed: LoadedModel) -> Setting:
    jobs = {path.stem: live.read_requests([path], loaded, max_tokens=options.max_tokens)[: options.lines] for path in options.jobs}
    jobs[TEMPLATES] = templates(loaded, math.ceil(options.lines * 300 / 64), max(options.max_tokens // 3, 2))
    drafters: dict[str, tuple[LoadedModel, dict[str, Any]]] = {
        PLAIN: (loaded, {"drafter": "off"}),
        "ngram": (loaded, {"drafter": "ngram"}),
        "suffix": (loaded, {"drafter": "suffix"}),
        COLD: (loaded, {"drafter": "cold"}),
    }
    trained = [source for source in find_automatic(packed.directory, packed.model.spec) if Path(source.origin).is_dir()]
    weights = []
    if trained:
        drafters["trained"] = (loaded, {"drafter": trained[0].origin})
        weights = [[path.stat().st_size, path.stat().st_mtime] for path in sorted(Path(trained[0].origin).glob("*.safetensors"))]
    drafters[AUTO] = (packed, {"drafter": "auto"})
    prompts = [[request.prompt_token_ids, request.sampling.max_tokens] for requests in jobs.values() for request in requests]
    spec = loaded.model.spec
    about = sha256(json.dumps([spec.name, spec.revision, spec.precision, weights, prompts]).encode()).hexdigest()[:16]
    return Setting(jobs, tuple(map(int, options.sizes.split(","))), options.repeats, drafters, about)


def templates(loaded: LoadedModel, count: int, max_tokens: int) -> list[Request]:
    """Prompts of one pattern that differ in a name and two numbers, and whose answers therefore differ a little."""
    tokenizer, rng = Tokenizer(loaded.tokenizer), random.Random(0)
    names = ("Anna", "Bela", "Chen", "Dora", "Emil", "Fatma", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
    made = []
    for number in range(count):
        text = (
            f"Order {rng.randrange(10_000, 100_000)} of {rng.choice(names)}: {rng.randrange(2, 9)} books. "
            "Write a short Python function that prints a receipt for one order."
        )
        tokens = tokenizer.encode_chat([{"role": "user", "content": text}])
        made.append(Request(str(number), tokens, SamplingParams(max_tokens=max_tokens, temperature=0.0), template="receipt"))
    return made


Runs = dict[tuple[str, int, str], list[dict[str, Any]]]
"""By job, sequences and drafter, in order of the repeats."""


def measure(setting: Setting, kept: Path) -> tuple[Runs, list[dict[str, Any]]]:
    """Runs what is not in the file yet."""
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {tuple(row["key"]): row for row in rows if row["about"] == setting.about}
    plan: list[tuple[str, int, str, int]] = []
    for repeat in range(setting.repeats):
        for size in setting.sizes:
            for job in setting.jobs:
                names = [*setting.drafters, *([AGAIN] if not repeat else [])]
                turn = repeat % len(names)
                plan += [(job, size, name, repeat) for name in names[turn:] + names[:turn]]
    caps = [(job, setting.sizes[0], f"cap {cap}", 0) for job in list(setting.jobs)[1:] for cap in CAPS]
    with live.Steps(len(plan) + len(caps)) as steps:
        for key in [*plan, *caps]:
            if key not in known:
                known[key] = {"about": setting.about, "key": list(key), **_run(setting, key, steps)}
                with kept.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
            else:
                steps.skip()
    runs: Runs = {}
    for job, size, name, repeat in plan:
        runs.setdefault((job, size, name), []).append(known[job, size, name, repeat])
    return runs, [
        {"job": job, "sequences": size, "cap": int(name.split()[1]), **_of_cap(known[job, size, name, 0])} for job, size, name, _ in caps
    ]


def _run(setting: Setting, key: tuple[str, int, str, int], steps: live.Steps) -> dict[str, Any]:
    job, size, name, repeat = key
    capped = name.startswith("cap ")
    loaded, fields = setting.drafters[AUTO if capped else PLAIN if name == AGAIN else name]
    label = f"{job}, {size} at once, {name}, {repeat + 1} of {1 if capped or name == AGAIN else setting.repeats}"
    with steps.one(label) as tick, tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl" if capped else None
        cap = {"max_draft_tokens": int(name.split()[1]), "trace": trace} if capped else {}
        got = live.run(loaded, EngineConfig(max_sequences=size, seed=0, **fields, **cap), setting.lines(job, size), tick=tick)
        chosen = Counter[int]() if trace is None else Counter(count for step in read_trace(trace).steps for count in step.chosen)
    stats = got.stats
    found: dict[str, Any] = {
        "tokens_per_second": round(got.tokens_per_second, 2),
        "acceptance_length": round(stats.acceptance_length, 4),
        "answers": sha256(json.dumps(sorted(got.answers().items())).encode()).hexdigest()[:16],
    }
    if trace is not None:
        lows = [*BINS, 1 << 30]
        found["chosen"] = {
            f"{low}-{high - 1}" if high - low > 1 and high < 1 << 30 else str(low): sum(
                n for value, n in chosen.items() if low <= value < high
            )
            for low, high in itertools.pairwise(lows)
        }
    return found


def _of_cap(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("tokens_per_second", "acceptance_length", "chosen")}


def judge(setting: Setting, runs: Runs) -> dict[str, Any]:
    """A row a cell and drafter, and the goals that were missed."""

    def speeds(cell: tuple[str, int], name: str) -> list[float]:
        return [row["tokens_per_second"] for row in runs[*cell, name]]

    def accepted(cell: tuple[str, int], name: str) -> float:
        return median(row["acceptance_length"] for row in runs[*cell, name]) - 1.0

    cells = [(job, size) for size in setting.sizes for job in setting.jobs]
    half = aa_half_width([speeds(cell, AGAIN)[0] / speeds(cell, PLAIN)[0] for cell in cells])
    rows, missed = [], []
    for cell in cells:
        plain = {row["answers"] for row in runs[*cell, PLAIN]}
        single = max((name for name in setting.drafters if name != AUTO), key=lambda name: median(speeds(cell, name)))
        for name in setting.drafters:
            over: Interval = ratio(speeds(cell, name), speeds(cell, PLAIN))
            row: dict[str, Any] = {"job": cell[0], "sequences": cell[1], "drafter": name}
            row |= {"tokens_per_second": round(median(speeds(cell, name)), 1), "over_none": round(over.median, 3)}
            row |= {"interval": [round(over.low, 3), round(over.high, 3)], "acceptance_length": round(accepted(cell, name) + 1.0, 3)}
            rows.append(row | {"same_answers": plain == {one["answers"] for one in runs[*cell, name]}})
        best = ratio(speeds(cell, AUTO), speeds(cell, single))
        rows[-1]["over_best_single"] = [single, round(best.median, 3), round(best.low, 3), round(best.high, 3)]
        if best.median < WITHIN - half:
            missed.append(f"auto is {best.median:.3f} of {single} on {cell[0]} at {cell[1]} sequences (goal {WITHIN - half:.3f})")
    first = (next(iter(setting.jobs)), setting.sizes[0])
    if "trained" in setting.drafters and (over := ratio(speeds(first, "trained"), speeds(first, PLAIN))).median < OVER_PLAIN:
        missed.append(f"the trained drafter is {over.median:.3f} of none on {first[0]} at {first[1]} sequences (goal {OVER_PLAIN})")
    cold = {}
    for size in setting.sizes:
        cell = (TEMPLATES, size)
        cold[str(size)] = {
            "accepted": round(accepted(cell, "suffix"), 3),
            "accepted_cold": round(accepted(cell, COLD), 3),
            "tokens_per_second": ratio(speeds(cell, "suffix"), speeds(cell, COLD)).row(),
        }
    of_first = cold[str(setting.sizes[0])]
    if (ours := of_first["accepted"]) < OVER_COLD * (theirs := of_first["accepted_cold"]) or ours == 0.0:
        missed.append(f"the suffix lookup has {ours} drafts accepted a step, a cold one {theirs} (goal {OVER_COLD} times as many)")
    if (faster := of_first["tokens_per_second"]["median"]) < OVER_COLD:
        missed.append(f"the suffix lookup has {faster:.2f} times a cold one's tokens a second (goal {OVER_COLD})")
    return {
        "benchmark": "drafters",
        "rows": rows,
        "aa_half_width": round(half, 4),
        "suffix_over_cold_on_templates": cold,
        "missed": missed,
        "pass": not missed,
    }


def print_caps(caps: list[dict[str, Any]]) -> None:
    from service.cli.output import print_table

    names = list(caps[0]["chosen"]) if caps else []
    columns = ("draft cap", "job", "sequences", "tok/s", "tokens a step", *(f"{name} drafts" for name in names))
    rows = [
        (
            row["cap"],
            row["job"],
            row["sequences"],
            row["tokens_per_second"],
            row["acceptance_length"],
            *(row["chosen"][name] for name in names),
        )
        for row in caps
    ]
    print_table(columns, rows, right=(columns[0], *columns[2:]))


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed over plain decoding, a panel for each number of sequences; and the chosen draft lengths by cap."""
    from matplotlib.figure import Figure

    sizes = sorted({row["sequences"] for row in result["rows"]})
    jobs = list(dict.fromkeys(row["job"] for row in result["rows"]))
    names = [name for name in dict.fromkeys(row["drafter"] for row in result["rows"]) if name != PLAIN]
    figure = Figure(figsize=(4.6 * (len(sizes) + 1), 4.2), layout="constrained")
    axes = figure.subplots(1, len(sizes) + 1)
    width = 0.85 / len(names)
    for panel, size in zip(axes, sizes, strict=False):
        for index, name in enumerate(names):
            found = {row["job"]: row for row in result["rows"] if row["sequences"] == size and row["drafter"] == name}
            heights = [found[job]["over_none"] for job in jobs]
            errors = [
                [height - found[job]["interval"][0] for job, height in zip(jobs, heights, strict=True)],
                [found[job]["interval"][1] - height for job, height in zip(jobs, heights, strict=True)],
            ]
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(jobs))]
            panel.bar(places, heights, width * 0.9, yerr=errors, label=name, capsize=2, error_kw={"linewidth": 1})
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(jobs)), jobs, fontsize="small")
        panel.set(title=f"{size} sequence{'s' if size > 1 else ''}: speed over plain decoding", ylim=(0, None))
    axes[0].legend(fontsize="small")
    for row in result["caps"]:
        total = sum(row["chosen"].values()) or 1
        label = f"{row['job']}, at most {row['cap']}: {row['tokens_per_second']:.0f} tok/s"
        style = "-" if row["job"] == TEMPLATES else ":"
        axes[-1].plot(
            list(row["chosen"]), [count / total for count in row["chosen"].values()], style, marker="o", markersize=3, label=label
        )
    axes[-1].set(title="Share of steps by drafts verified", xlabel="drafts", ylim=(0, None))
    axes[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
