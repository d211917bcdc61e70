"""How far drafters get on prompts that none was trained on: `python -m tests.benchmarks.drafter_quality --prompts FILE --out FOLDER
[--drafter [NAME=]SOURCE ...] [--each 40] [--temperatures 0,1]`.

Prompts: those that the hash rule keeps for judging, the first `--each` of every domain. Drafters: n-gram, the suffix lookup, every one that
is given (a folder, a registered name, or a small model with the target's tokenizer), and the portfolio of the lookup and the first of
them. Every request drafts `--drafts` tokens a step, whatever that costs. Acceptance lengths (bonus token included) by domain with 95%
intervals, the ratios of those that were trained for as many steps to the given DFlash (rank 0), and for confidence heads, by position, over
15 bins of equal mass: calibration error before and after temperature scaling and as the engine foretold drafts while it ran (which learns
from every block; the goals are for this forecast, which plans go by), its Brier score beside the base rate's, its AUC. With the training
logs that the folders hold.

Every row is kept in FOLDER as it is measured: run again, it goes on; `evaluation.json`, `evaluation.md` and the plots are made anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoints import LoadedModel, default_cache_dir
from engine.checkpoints.drafters.folder import read_folder
from engine.checkpoints.drafters.formats import block_spec
from engine.drafters.builtin import PORTFOLIO, TEXT_DRAFTERS
from engine.drafters.sources import registry_folders
from engine.profile import Profiles
from engine.training.evaluate import Measured, measure, ratio
from engine.training.judge import Judged, fitted, plot_reliability
from engine.training.prompts import Prompt, balanced, digest, read_prompts, split
from engine.training.provenance import read_provenance
from tests.benchmarks import live

MACRO, OVER_DFLASH, ERROR, AREA = 2.0, 1.10, 0.015, 0.75
DOMAINS = ("math", "code", "chat", "macro")
FIGURES = ("ece_before", "ece_after", "ece_running", "brier", "base_brier", "auc")


def main() -> int:
    parser = live.arguments(__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL lines with `prompt` and `domain`")
    parser.add_argument("--all", action="store_true", help="take the prompts as they come, not only the tenth that is kept for judging")
    parser.add_argument("--drafter", action="append", default=[], help="repeatable: [NAME=]SOURCE")
    parser.add_argument("--each", type=int, default=40, help="prompts of every domain (default: %(default)s)")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--drafts", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-sequences", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    given = read_prompts(options.prompts)
    prompts = balanced(given if options.all else split(given).judged, options.each)
    loaded = live.load(options)
    names = {name: name for name in TEXT_DRAFTERS}
    named = dict(_named(text) for text in options.drafter)
    names |= named
    folders = {name: path for name, source in named.items() if (path := folder_of(source)) is not None}
    for name, folder in folders.items():
        record = read_provenance(folder)
        seen = {digest(prompt.text) for prompt in prompts} & {*record.get("trained", ()), *record.get("calibrated", ())}
        if seen:
            parser.error(f"{name} was trained or calibrated on {len(seen)} of these prompts")
    if folders:
        names[PORTFOLIO] = PORTFOLIO
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Judged]] = {}
    with tempfile.TemporaryDirectory() as place, live.Steps(len(names) * len(options.temperatures.split(","))) as steps:
        packed = live.with_drafters(loaded, list(folders.values())[:1], Path(place)) if folders else loaded
        for temperature in map(float, options.temperatures.split(",")):
            rows: dict[str, Judged] = {}
            for name, source in names.items():
                label = f"{name} at temperature {temperature:g}"
                got = kept(options, packed if name == PORTFOLIO else loaded, name, source, prompts, temperature, steps, label)
                rows[name] = Judged(got, fitted(source, temperature, options.drafts))
            found[f"{temperature:g}"] = rows
    result = summary(found, folders, options, prompts)
    (options.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "evaluation.md").write_text(markdown(result))
    for temperature, rows in found.items():
        if any(len(one.got.stood) for one in rows.values()):
            plot_reliability(rows, options.out / f"reliability-{temperature}.png")
    plot(result, options.out / "acceptance.png")
    if options.as_json:
        print(json.dumps(result))
    else:
        print(markdown(result))
    return int(not result["pass"])


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).name, text)


def folder_of(source: str) -> Path | None:
    """Of a drafter that lies in a folder and is no whole model."""
    places = (Path(source).expanduser(), *(place / source for place in registry_folders()))
    path = next((path for path in places if (path / "config.json").is_file()), None)
    return path if path is not None and read_folder(path).layout != "model" else None


def kept(
    options: Any, loaded: LoadedModel, name: str, source: str, prompts: list[Prompt], temperature: float, steps: live.Steps, label: str
) -> Measured:
    """What was measured before with the same settings, prompts and weights, or is measured now."""
    folder = folder_of(source)
    stamp = [digest(prompt.text) for prompt in prompts]
    about = {
        "settings": [temperature, options.drafts, options.max_tokens, options.max_sequences, loaded.model.spec.revision],
        "weights": None if folder is None else [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))],
        "written": None if folder is None else [path.stat().st_mtime for path in sorted(folder.glob("*.safetensors"))],
        "members": sorted(path.resolve().name for path in (loaded.directory / "drafters").glob("*")) if name == PORTFOLIO else None,
        "prompts": stamp,
    }
    path = options.out / f"{name}-{temperature:g}.npz"
    if path.exists():
        with np.load(path) as stored:
            if json.loads(str(stored["about"])) == about and "foretold" in stored:
                steps.skip()
                return _unpack(dict(stored))
    with steps.one(label) as tick:
        got = measure(
            loaded,
            source,
            prompts,
            temperature=temperature,
            drafts=options.drafts,
            max_tokens=options.max_tokens,
            max_sequences=options.max_sequences,
            profiles=Profiles(default_cache_dir(), keep_records=False),
            tick=tick,
        )
    columns = {f"{kind}:{domain}": values for kind in ("tokens", "steps") for domain, values in getattr(got, kind).items()}
    np.savez_compressed(path, about=json.dumps(about), evidence=got.evidence, foretold=got.foretold, stood=got.stood, **columns)
    return got


def _unpack(stored: dict[str, Any]) -> Measured:
    tables: dict[str, dict[str, Any]] = {"tokens": {}, "steps": {}}
    for key, values in stored.items():
        kind, colon, domain = key.partition(":")
        if colon:
            tables[kind][domain] = values
    return Measured(tables["tokens"], tables["steps"], stored["evidence"], stored["foretold"], stored["stood"])


def summary(found: dict[str, dict[str, Judged]], folders: dict[str, Path], options: Any, prompts: list[Prompt]) -> dict[str, Any]:
    """Every figure, and the goals that were missed. The goals are those of the first given drafter; that over DFlash is for every Markov
    head that was trained for as many steps.
    """
    specs = {name: block_spec(read_folder(folder).config) for name, folder in folders.items() if "eagle" not in read_folder(folder).layout}
    flash = next((name for name, spec in specs.items() if spec.markov_rank == 0), None)
    steps = {name: read_folder(folders[name]).record.get("steps") for name in specs}
    peers = [name for name in specs if flash is not None and name != flash and steps[name] == steps[flash]]
    first = next(iter(folders), None)
    missed: list[str] = []
    temperatures: dict[str, Any] = {}
    for temperature, rows in found.items():
        table = {name: one.row() | {"details": one.details()} for name, one in rows.items()}
        ratios = {}
        if flash is not None:
            ratios = {name: [round(value, 4) for value in ratio(rows[name].got, rows[flash].got)] for name in peers}
        temperatures[temperature] = {"drafters": table, "over_dflash": ratios}
        if first is None:
            continue
        goals = [("macro", table[first]["macro"] or 0.0, MACRO)] if float(temperature) == 0.0 else []
        missed += [f"{first} at {temperature}: {what} {value} < {goal}" for what, value, goal in goals if value < goal]
        over = {name: ratios[name][0] for name in peers if specs[name].markov_type == "vanilla"}
        missed += [f"{name} at {temperature}: {value} of DFlash < {OVER_DFLASH}" for name, value in over.items() if value < OVER_DFLASH]
        missed += [f"{first} at {temperature}: {problem}" for problem in uncalibrated(table[first]["details"].get("calibration"))]
    curves = {name: rows for name, folder in folders.items() if (rows := curve(folder))}
    counts = {domain: sum(prompt.domain == domain for prompt in prompts) for domain in sorted({prompt.domain for prompt in prompts})}
    return {
        "benchmark": "drafter quality",
        "prompts": counts,
        "drafts": options.drafts,
        "max_tokens": options.max_tokens,
        "temperatures": temperatures,
        "curves": curves,
        "missed": missed,
        "pass": not missed,
    }


def uncalibrated(figures: dict[str, list[Any]] | None) -> list[str]:
    """Positions at which a confidence head misses a goal; where no draft ever stood there is nothing to tell apart."""
    if figures is None:
        return []
    wrong = []
    for position, (_, _, error, brier, base, area) in enumerate(zip(*(figures[name] for name in FIGURES), strict=True), 1):
        if area is None:
            continue
        wrong += [f"calibration error {error:.4f} > {ERROR} at draft {position}"] if error > ERROR else []
        wrong += [f"Brier {brier:.4f} not below the base rate's {base:.4f} at draft {position}"] if brier >= base else []
        wrong += [f"AUC {area:.3f} < {AREA} at draft {position}"] if area < AREA else []
    return wrong


def curve(folder: Path) -> list[list[float]]:
    """[step, macro acceptance length on held-out texts] while it was trained, from its log or its record."""
    log = folder / "training" / "log.jsonl"
    found = {float(step): length for step, length in read_folder(folder).record.get("held_out_length", {}).items()}
    if log.is_file():
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        found = {row["step"]: row["held_length"] for row in rows if "held_length" in row}
    return [[step, length["macro"]] for step, length in found.items()]


def markdown(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {domain}" for domain, count in result["prompts"].items())
    lines = [
        f"Acceptance length (bonus token included) on prompts kept for judging ({counts}); {result['drafts']} drafts a step, answers of"
    ]
    lines[0] += f" up to {result['max_tokens']} tokens; 95% bootstrap intervals over requests."
    for temperature, found in result["temperatures"].items():
        lines += ["", f"Temperature {temperature}:", "", f"| drafter | {' | '.join(DOMAINS)} | over DFlash |", "|---|" + "---:|" * 5]
        for name, row in found["drafters"].items():
            cells = [_cell(row.get(domain), row["details"]["intervals"].get(domain)) for domain in DOMAINS]
            over = found["over_dflash"].get(name)
            lines.append(f"| {name} | {' | '.join(cells)} | {'' if over is None else _cell(over[0], over[1:])} |")
        for name, row in found["drafters"].items():
            if (figures := row["details"].get("calibration")) is None:
                continue
            lines += ["", f"{name}, calibration over {row['details']['blocks']} blocks:", ""]
            lines += ["| drafts 1 to | error before | error after | error running | Brier | base rate's | AUC |", "|---:|" + "---:|" * 6]
            columns = list(zip(*(figures[column] for column in FIGURES), strict=True))
            lines += [
                f"| {place} | {' | '.join('' if value is None else f'{value:.4f}' for value in values)} |"
                for place, values in enumerate(columns, 1)
            ]
    lines += ["", *(f"Missed: {problem}." for problem in result["missed"])]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def plot(result: dict[str, Any], path: Path) -> None:
    """Acceptance lengths by domain and drafter at each temperature, and how they rose in training."""
    from matplotlib.figure import Figure

    temperatures = result["temperatures"]
    panels = len(temperatures) + bool(result["curves"])
    figure = Figure(figsize=(5.6 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel, (temperature, found) in zip(axes, temperatures.items(), strict=False):
        shown = [domain for domain in DOMAINS if any(row.get(domain) is not None for row in found["drafters"].values())]
        width = 0.85 / len(found["drafters"])
        for index, (name, row) in enumerate(found["drafters"].items()):
            heights = [row.get(domain) or np.nan for domain in shown]
            ends = [row["details"]["intervals"].get(domain, [np.nan] * 2) for domain in shown]
            errors = [[height - low for height, (low, _) in zip(heights, ends, strict=True)]]
            errors += [[high - height for height, (_, high) in zip(heights, ends, strict=True)]]
            places = np.arange(len(shown)) + (index - (len(found["drafters"]) - 1) / 2) * width
            panel.bar(places, heights, width * 0.92, yerr=errors, capsize=2, label=name, error_kw={"linewidth": 1})
        panel.set_xticks(range(len(shown)), shown)
        panel.set(title=f"Tokens a step, temperature {temperature}", ylim=(1, None))
    if result["curves"]:
        for name, rows in result["curves"].items():
            axes[-1].plot(*zip(*rows, strict=True), marker="o", markersize=3, label=name)
        axes[-1].set(title="Held-out acceptance length in training", xlabel="step", ylim=(1, None))
        axes[-1].legend(fontsize="small")
    # Below the panels: bars are high where a legend within would lie.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
