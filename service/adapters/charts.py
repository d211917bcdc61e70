"""Charts as files, by matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from service.errors import ConfigError, InvalidRequest

ENDINGS = (".png", ".svg", ".pdf")
_HEIGHT, _WIDTH = 4.5, 1.2
"""Inches: of the chart, and of a group of bars."""
_LABEL_CHARACTERS = 12
"""As wide as a group of bars: longer labels are slanted."""


def bar_chart(labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, title: str, path: str) -> None:
    """Groups of bars, one a label (newlines allowed), in dollars; None says that there is no figure instead of drawing a bar.

    Raises:
        InvalidRequest: the file's ending, or a folder that cannot be written to.
        ConfigError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in ENDINGS:
        raise InvalidRequest(f"A chart ends in {', '.join(ENDINGS)} (or is `terminal`); got {path!r}.", param="plot")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("Charts need matplotlib: pip install 'longdraft[plot]', or use --plot terminal.") from None
    figure = Figure(figsize=(max(6.0, _WIDTH * len(labels) + 2), _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place, value in enumerate(values) if value is not None]
        for place in (place for place, value in enumerate(values) if value is None):
            axes.annotate(
                "no rate", (place + (number - (len(series) - 1) / 2) * width, 0), ha="center", va="bottom", fontsize=7, rotation=90
            )
        axes.bar(places, [value for value in values if value is not None], width, label=name)
    crowded = any(len(line) > _LABEL_CHARACTERS for label in labels for line in label.split("\n"))
    axes.set_xticks(range(len(labels)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set_ylabel("dollars")
    axes.set_title(title)
    axes.ticklabel_format(axis="y", style="plain" if _largest(series) >= 0.01 else "sci", scilimits=(0, 0))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidRequest(f"Cannot write {path}: {error.strerror or error}.", param="plot") from error


def _largest(series: Mapping[str, Sequence[float | None]]) -> float:
    return max((value for values in series.values() for value in values if value is not None), default=0.0)
