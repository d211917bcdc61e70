"""`longdraft bench --paper`: figures 2, 5, 6 and 8 of the DSpark paper (arXiv 2607.05147) for offline batches on this machine and model.

2: how often a draft stands, position by position, for each drafter. 5: tokens a step against the number of drafts, and what that does to
throughput. 6: predicted against observed survival, before and after calibration. 8: throughput against the number of sequences, plain,
with a fixed draft length and as planned, and what a million tokens cost.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from service.cli.output import Failure

if TYPE_CHECKING:
    from engine.checkpoints import LoadedModel
    from engine.types import Request
    from service.cli.bench.plan import BenchLine, BenchRequest

_PLAIN, _FIXED, _PLANNED = "plain", "fixed", "planned"
_FEWEST, _DEEP = 4, 2
"""Lines of a run at least, and for each sequence."""
_LABELS = {_PLAIN: -3, _FIXED: -14, _PLANNED: 8}
"""Where a price stands beside its point, so that those of one size do not cover each other."""
_COLOURS = {_PLAIN: "#b8b8b8", _FIXED: "#d98c3f", _PLANNED: "#1f6f8b"}


@dataclass(frozen=True, slots=True)
class PaperPlan:
    """sizes: sequences at once. lengths: drafts a step of figure 5. block: drafts of the fixed configuration and of figures 2 and 6.

    A run of few sequences gets few lines, from all over the job: about ten minutes on two cores for a model of 135M parameters.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...] = (1, 2, 4, 7, 12, 16)
    block: int = 7
    max_tokens: int = 96
    repeats: int = 3
    dollars_per_hour: float | None = None

    @property
    def middle(self) -> int:
        """Sequences at once where speed does not matter."""
        return self.sizes[len(self.sizes) // 2]

    def share(self, count: int, sequences: int) -> list[int]:
        """Which of `count` lines are run at so many sequences."""
        wanted = min(count, max(_FEWEST, _DEEP * sequences))
        return [place * count // wanted for place in range(wanted)]

    def dollars(self, tokens_per_second: float) -> float | None:
        """Per million generated tokens."""
        return None if self.dollars_per_hour is None else round(self.dollars_per_hour / (tokens_per_second * 3600.0) * 1e6, 6)


@dataclass(frozen=True, slots=True)
class _Run:
    tokens_per_second: float
    acceptance_length: float
    positions: list[float]


def of_request(request: BenchRequest, dollars_per_hour: float | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """For a checked command line. Dollars an hour are the settings' for this device where None. Raises Failure."""
    from engine.checkpoints import load_model
    from service.billing.operator import HourlyRates
    from service.cli.bench.session import describe
    from service.domain.money import FEMTO_PER_DOLLAR

    entry, settings = request.entry, request.settings
    device, cache = settings.engine.device, settings.cache_dir
    try:
        loaded = load_model(entry.source, dtype=request.dtype, device=device, revision=entry.revision, cache_dir=cache)
    except (ValueError, OSError) as error:
        raise Failure(str(error)) from error
    device = str(loaded.model.spec.device)
    rate = HourlyRates.parse(settings.rates).of(device)
    dollars = dollars_per_hour if dollars_per_hour is not None else None if rate is None else rate / FEMTO_PER_DOLLAR
    report = run_paper(loaded, request.lines, PaperPlan(request.batch_sizes, repeats=request.repeats, dollars_per_hour=dollars), tell)
    return {"job": request.job, "device": describe(device), **report}


def run_paper(loaded: LoadedModel, lines: Sequence[BenchLine], plan: PaperPlan, tell: Callable[[str], None]) -> dict[str, Any]:
    """Every figure's numbers. Raises Failure where the engine gives a line no answer."""
    from engine.drafters.builtin import AUTO, OFF, TEXT_DRAFTERS
    from engine.drafters.sources import find_automatic

    requests = _requests(loaded, lines, plan.max_tokens)
    neural = [source.origin for source in find_automatic(loaded.directory, loaded.model.spec) if Path(source.origin).is_dir()]
    drafters = {name: name for name in TEXT_DRAFTERS} | {Path(origin).name: origin for origin in neural}
    best = neural[0] if neural else "suffix"
    clock = _Clock(len(drafters) + len(plan.lengths) + 1 + len(neural) + 3 * len(plan.sizes) * plan.repeats, tell)

    def run(sequences: int, **settings: Any) -> _Run:
        return _run(loaded, [requests[place] for place in plan.share(len(requests), sequences)], sequences, settings)

    positions = {}
    for name, source in drafters.items():
        clock.next(f"figure 2: {name}")
        made = run(plan.middle, drafter=source, fixed_drafts=plan.block, max_draft_tokens=plan.block)
        positions[name] = {"acceptance_length": made.acceptance_length, "by_position": made.positions}
    lengths = []
    for count in plan.lengths:
        clock.next(f"figure 5: {count} drafts")
        made = run(plan.sizes[0], drafter=best, fixed_drafts=count, max_draft_tokens=count)
        lengths.append({"drafts": count, "acceptance_length": made.acceptance_length, "tokens_per_second": made.tokens_per_second})
    clock.next("figure 5: as planned")
    made = run(plan.sizes[0], drafter=best)
    planned = {"acceptance_length": made.acceptance_length, "tokens_per_second": made.tokens_per_second}
    calibration = {}
    for origin in neural:
        clock.next(f"figure 6: {Path(origin).name}")
        calibration[Path(origin).name] = _calibration(loaded, origin, lines, plan)
    load = []
    kinds: dict[str, dict[str, Any]] = {
        _PLAIN: {"drafter": OFF},
        _FIXED: {"drafter": best, "fixed_drafts": plan.block},
        _PLANNED: {"drafter": AUTO},
    }
    for size in plan.sizes:
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in range(plan.repeats):
            for kind in sorted(kinds, reverse=bool(repeat % 2)):
                clock.next(f"figure 8: {size} sequences, {kind}, {repeat + 1} of {plan.repeats}")
                speeds[kind].append(run(size, **kinds[kind]).tokens_per_second)
        for kind, values in speeds.items():
            speed = median(values)
            row = {"sequences": size, "kind": kind, "tokens_per_second": round(speed, 2), "min": round(min(values), 2)}
            load.append(row | {"max": round(max(values), 2), "dollars_per_million_tokens": plan.dollars(speed)})
    return {
        "model": loaded.model.spec.name,
        "lines": len(requests),
        "drafter": Path(best).name,
        "block": plan.block,
        "dollars_per_hour": plan.dollars_per_hour,
        "figures": {
            "2": positions,
            "5": {"sequences": plan.sizes[0], "fixed": lengths, "planned": planned},
            "6": calibration,
            "8": load,
        },
    }


class _Clock:
    """Says before each of `count` measurements which it is, and how long the rest will take."""

    def __init__(self, count: int, tell: Callable[[str], None]) -> None:
        self._count, self._tell = count, tell
        self._done = 0
        self._started = time.monotonic()

    def next(self, what: str) -> None:
        left = (time.monotonic() - self._started) / max(self._done, 1) * (self._count - self._done)
        self._done += 1
        about = f", about {left / 60:.0f} minutes left" if self._done > _FEWEST else ""
        self._tell(f"{self._done} of {self._count}{about}: {what}")


def _requests(loaded: LoadedModel, lines: Sequence[BenchLine], max_tokens: int) -> list[Request]:
    from engine.tokenizer import Tokenizer
    from engine.types import Request, SamplingParams

    tokenizer = Tokenizer(loaded.tokenizer)
    found = []
    for line in lines:
        body = line.body
        tokens = tokenizer.encode_chat(body["messages"]) if "messages" in body else tokenizer.encode(body["prompt"])
        limit = min(max_tokens, int(body.get("max_tokens") or max_tokens))
        found.append(Request(str(line.line_no), tokens, SamplingParams(max_tokens=limit, temperature=0.0), template=str(hash(tokens[:16]))))
    return found


def _run(loaded: LoadedModel, requests: Sequence[Request], sequences: int, settings: dict[str, Any]) -> _Run:
    """One engine, all requests; its profile is kept, so that only the first measures the machine."""
    from engine.checkpoints import default_cache_dir
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.lab.stand_in import acceptance_by_depth
    from engine.lab.trace import read_trace
    from engine.profile import Profiles
    from engine.types import FinishReason

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        config = EngineConfig(max_sequences=sequences, seed=0, trace=trace, **settings)
        engine = Engine(loaded, config, Profiles(default_cache_dir()))
        generated, started = 0, time.perf_counter()
        for result in engine.run(replace(request) for request in requests):
            if result.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                raise Failure(f"Line {result.id} got no answer: {result.error}")
            generated += len(result.token_ids)
        seconds = time.perf_counter() - started
        depth = config.max_draft_tokens if config.fixed_drafts is not None else 0
        rates = acceptance_by_depth(read_trace(trace).steps, depth).tolist() if depth else []
    return _Run(generated / seconds, round(engine.stats().acceptance_length, 4), [round(rate, 4) for rate in rates])


def _calibration(loaded: LoadedModel, drafter: str, lines: Sequence[BenchLine], plan: PaperPlan) -> dict[str, Any]:
    """Reliability points before and after scaling and as foretold while running, by position."""
    from engine.training.calibrate import reliability
    from engine.training.judge import evaluate
    from engine.training.prompts import Prompt

    asked = [
        next(turn["content"] for turn in line.body["messages"] if turn["role"] == "user")
        if "messages" in line.body
        else line.body["prompt"]
        for line in lines
    ]
    prompts = [Prompt(text) for text in asked if isinstance(text, str)]
    (judged,) = evaluate(loaded, [drafter], prompts, drafts=plan.block, max_tokens=plan.max_tokens).values()
    if not len(judged.got.stood):
        return {}
    points = {
        name: [[[round(float(value), 4) for value in axis] for axis in pair] for pair in reliability(predicted, judged.got.stood)]
        for name, predicted in judged.predicted().items()
    }
    return {**judged.details()["calibration"], **points}


def plot_paper(report: dict[str, Any], path: Path) -> None:
    """The four figures side by side. Raises Failure where the file cannot be written."""
    from matplotlib.figure import Figure

    figures = report["figures"]
    figure = Figure(figsize=(13.0, 8.4), layout="constrained")
    (second, fifth), (sixth, eighth) = figure.subplots(2, 2)
    for name, row in figures["2"].items():
        places = range(1, len(row["by_position"]) + 1)
        second.plot(places, row["by_position"], marker="o", markersize=4, label=f"{name}, {row['acceptance_length']:.2f} tokens a step")
    second.set(title="Figure 2: chance that a draft stands, those before it standing", xlabel="position", ylim=(0, 1))
    fixed = figures["5"]["fixed"]
    drafts = [row["drafts"] for row in fixed]
    fifth.plot(drafts, [row["acceptance_length"] for row in fixed], marker="o", markersize=4, color=_COLOURS[_FIXED], label="tokens a step")
    fifth.axhline(figures["5"]["planned"]["acceptance_length"], color=_COLOURS[_PLANNED], linestyle="--", label="tokens a step, as planned")
    speeds = fifth.twinx()
    speeds.plot(drafts, [row["tokens_per_second"] for row in fixed], color="0.5", marker="s", markersize=3, linewidth=1)
    speeds.axhline(figures["5"]["planned"]["tokens_per_second"], color="0.5", linestyle=":", linewidth=1)
    speeds.set_ylabel("grey: tokens a second (dotted: as planned)")
    speeds.set_ylim(bottom=0)
    fifth.set(
        title=f"Figure 5: {report['drafter']} by draft length, {figures['5']['sequences']} at once",
        xlabel="drafts a step",
        ylim=(0.9, None),
    )
    sixth.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for name, row in figures["6"].items():
        for label, style in (("before", ":"), ("after", "-")):
            for position in (0, min(2, len(row.get(label, [])) - 1)):
                if row.get(label):
                    predicted, stood = row[label][position]
                    sixth.plot(predicted, stood, style, marker="o", markersize=3, label=f"{name}, drafts 1..{position + 1}, {label}")
    sixth.set(title="Figure 6: survival, predicted and observed", xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    _load_panel(eighth, figures["8"])
    for axes in (second, fifth, sixth, eighth):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(f"{report['model']}, {report['lines']} lines, {report['device']}", fontsize=10)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}.") from error


def _load_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    for kind, colour in _COLOURS.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        speeds = [row["tokens_per_second"] for row in of_kind]
        spread = [[row["tokens_per_second"] - row["min"] for row in of_kind], [row["max"] - row["tokens_per_second"] for row in of_kind]]
        axes.errorbar(
            [row["sequences"] for row in of_kind], speeds, yerr=spread, color=colour, marker="o", markersize=4, capsize=3, label=kind
        )
        for row in of_kind:
            if row["dollars_per_million_tokens"] is not None:
                text = f"${row['dollars_per_million_tokens']:.2f}/M"
                axes.annotate(
                    text,
                    (row["sequences"], row["tokens_per_second"]),
                    (7, _LABELS[kind]),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
    axes.set_xscale("log", base=2)
    sizes = sorted({row["sequences"] for row in rows})
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.margins(x=0.12)
    axes.set(title="Figure 8: tokens a second by sequences at once", xlabel="sequences", ylim=(0, None))


def print_paper(report: dict[str, Any]) -> None:
    from service.cli.output import note, print_table

    figures = report["figures"]
    width = max((len(row["by_position"]) for row in figures["2"].values()), default=0)
    columns = ("figure 2: drafter", "tokens a step", *(f"draft {place + 1}" for place in range(width)))
    rows = [
        (name, f"{row['acceptance_length']:.3f}", *(f"{rate:.3f}" for rate in row["by_position"])) for name, row in figures["2"].items()
    ]
    print_table(columns, rows, right=columns[1:])
    columns = ("figure 5: drafts a step", "tokens a step", "tok/s")
    shown = [*figures["5"]["fixed"], {"drafts": "as planned", **figures["5"]["planned"]}]
    print_table(columns, [(row["drafts"], row["acceptance_length"], f"{row['tokens_per_second']:.1f}") for row in shown], right=columns[1:])
    columns = ("figure 6: drafter", "position", "error before", "error after", "error running", "Brier", "base rate's", "AUC")
    names = ("ece_before", "ece_after", "ece_running", "brier", "base_brier", "auc")
    rows = [
        (name, position + 1, *("" if (value := row[column][position]) is None else f"{value:.4f}" for column in names))
        for name, row in figures["6"].items()
        for position in range(len(row.get("auc", [])))
    ]
    print_table(columns, rows, right=columns[1:])
    columns = ("figure 8: sequences", "kind", "tok/s", "min", "max", "$ per million tokens")
    rows = [
        (row["sequences"], row["kind"], row["tokens_per_second"], row["min"], row["max"], row["dollars_per_million_tokens"] or "")
        for row in figures["8"]
    ]
    print_table(columns, rows, right=columns[2:])
    if report["dollars_per_hour"] is None:
        note("No dollars: this device has no hourly rate in the settings' [rates], and --dollars-per-hour was not given.")
