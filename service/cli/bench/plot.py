"""A benchmark's figures as a chart: tokens a second of every configuration, with the range of its runs, and the bound.

Runs that were stopped, because others were much faster, have no speed: they stand below the others, without a bar, and say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.cli.batch_cmds import require_place
from service.cli.bench.session import STOP_TIMES
from service.cli.output import Failure

ENDINGS = (".png", ".svg", ".pdf")
_OURS, _THEIRS = "#1f6f8b", "#b8b8b8"


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises Failure."""
    if path.suffix.lower() not in ENDINGS:
        raise Failure(f"--plot takes a file that ends in {', '.join(ENDINGS)}; got {path}.")
    require_place(path)
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise Failure("--plot needs matplotlib: pip install 'longdraft[plot]'.") from None


def plot_bench(report: dict[str, Any], path: Path) -> None:
    """Raises Failure where the file cannot be written."""
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    runs = sorted(report["runs"], key=lambda run: (not run["stopped"], run["tokens_per_second"]["median"]))
    speeds = [run["tokens_per_second"] for run in runs]
    medians = [speed["median"] for speed in speeds]
    spread = [
        [speed["median"] - speed["min"] for speed in speeds],
        [speed["max"] - speed["median"] for speed in speeds],
    ]
    figure = Figure(figsize=(9.0, 1.6 + 0.42 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    colours = [_OURS if run["kind"] == "longdraft" else _THEIRS for run in runs]
    axes.barh(range(len(runs)), medians, xerr=spread, color=colours, error_kw={"capsize": 3, "linewidth": 1})
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs])
    for place, (run, speed) in enumerate(zip(runs, speeds, strict=True)):
        style = "italic" if run["stopped"] else "normal"
        axes.annotate(_said(run), (speed["max"], place), va="center", fontsize=8, style=style)
    sides = {_OURS: "Longdraft", _THEIRS: "others"}
    legend: list[Artist] = [Patch(color=colour, label=side) for colour, side in sides.items() if colour in colours]
    if (bound := report.get("bound")) is not None:
        line = axes.axvline(bound["tokens_per_second"], color="black", linestyle="--", linewidth=1, label="bound by the fastest product")
        legend.append(line)
    axes.set_xlim(0, 1.25 * max([*(speed["max"] for speed in speeds), bound["tokens_per_second"] if bound else 0.0]))
    note = f"\nstopped: not done in {STOP_TIMES:g} times the fastest peer's time" if any(run["stopped"] for run in runs) else ""
    axes.set_xlabel(f"generated tokens per second (median; bars: least and most){note}")
    axes.set_title(f"{report['job']}, {report['lines']} lines\n{report['device']}", fontsize=10)
    axes.legend(handles=legend, loc="lower right", fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise Failure(f"Cannot write {path}: {error.strerror or error}.") from None


def _said(run: dict[str, Any]) -> str:
    """What stands beside a bar."""
    if run["stopped"]:
        return f"  stopped after {run['seconds'][0]:.0f} s"
    same = run["identical_to_reference"]
    differs = f"   {same[0]}/{same[1]} as the reference" if same and same[0] != same[1] else ""
    return f"  {run['tokens_per_second']['median']:.0f}{differs}"
