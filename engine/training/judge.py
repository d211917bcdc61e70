"""Drafters beside each other on the same prompts: figures, the quality of their forecasts, reliability diagrams."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoints.drafters.folder import read_folder
from engine.drafters.parts.confidence import bucket_of, spread_out
from engine.drafters.sources import registry_folders
from engine.training.calibrate import quality, reliability, survival
from engine.training.evaluate import measure
from engine.training.report import SILENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.checkpoints import LoadedModel
    from engine.profile import Profiles
    from engine.training.calibrate import Quality
    from engine.training.evaluate import Measured
    from engine.training.prompts import Prompt
    from engine.training.report import Report


def evaluate(
    loaded: LoadedModel,
    drafters: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    temperature: float = 0.0,
    drafts: int = 7,
    max_tokens: int = 256,
    max_sequences: int | None = None,
    profiles: Profiles | None = None,
    report: Report = SILENT,
) -> dict[str, Judged]:
    """How far each drafter gets on these prompts, by its name. profiles: where this machine's step times are kept, see `measure`."""
    found: dict[str, Judged] = {}
    for drafter in drafters:
        got = measure(
            loaded,
            drafter,
            prompts,
            temperature=temperature,
            drafts=drafts,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            profiles=profiles,
            tick=partial(report.tick, _name(drafter)),
        )
        found[_name(drafter)] = Judged(got, fitted(drafter, temperature, drafts))
        report.tell(f"{_name(drafter)}: {_lengths(got.acceptance)}")
    return found


def _lengths(acceptance: Mapping[str, float]) -> str:
    return ", ".join(f"{domain} {length:.3f}" for domain, length in acceptance.items()) or "no request took a step"


@dataclass(frozen=True, slots=True)
class Judged:
    """One drafter's figures. scales: float64 [3, K] as `calibrate.fit` gives them."""

    got: Measured
    scales: np.ndarray

    def row(self) -> dict[str, float | None]:
        """Acceptance length (bonus token included) by domain and `macro`; the calibration error, mean over positions, None without one."""
        row: dict[str, float | None] = {name: round(value, 4) for name, value in self.got.acceptance.items()}
        row.setdefault("macro", None)
        found = self.qualities()
        return row | {f"ece_{when}": round(float(found[when].ece.mean()), 5) if found else None for when in ("before", "after")}

    def predicted(self) -> dict[str, np.ndarray]:
        """float64 [N, K] each, the chance that drafts 1..k stand: `before` temperature scaling, `after` it, and `running`: as the engine
        foretold it, which goes on learning from every block. Nothing where a drafter gives no evidence.
        """
        if not len(self.got.stood):
            return {}
        return {"before": survival(self.got.evidence), "after": survival(self.got.evidence, self.scales), "running": self.got.foretold}

    def qualities(self) -> dict[str, Quality]:
        return {when: quality(predicted, self.got.stood) for when, predicted in self.predicted().items()}

    def details(self) -> dict[str, Any]:
        """Intervals of the acceptance lengths, requests behind them, and by position the calibration's quality.

        Brier score and AUC are those of the running forecast, which the planner goes by. An AUC is None where all or none of the drafts
        stood.
        """
        found: dict[str, Any] = {
            "intervals": {name: [round(end, 4) for end in ends] for name, ends in self.got.intervals().items()},
            "requests": {domain: len(rows) for domain, rows in self.got.tokens.items()},
        }
        if qualities := self.qualities():
            running = qualities["running"]
            columns = {f"ece_{when}": one.ece for when, one in qualities.items()}
            columns |= {"brier": running.brier, "base_brier": running.base_brier, "auc": running.auc}
            found["calibration"] = {name: [_rounded(value) for value in column] for name, column in columns.items()}
            found["blocks"] = len(self.got.stood)
        return found


def plot_reliability(judged: Mapping[str, Judged], path: Path) -> None:
    """Of every drafter that gives evidence: predicted chance that drafts 1..k stand against how many did; see `Judged.predicted`."""
    from matplotlib.figure import Figure

    shown = {name: one for name, one in judged.items() if len(one.got.stood)}
    width = max((one.got.stood.shape[1] for one in shown.values()), default=1)
    figure = Figure(figsize=(2.4 * width, 2.6 * max(len(shown), 1)), layout="constrained")
    grid = figure.subplots(max(len(shown), 1), width, squeeze=False, sharex=True, sharey=True)
    for row, (name, one) in enumerate(shown.items()):
        for label, chances in one.predicted().items():
            for position, (predicted, stood) in enumerate(reliability(chances, one.got.stood)):
                axes = grid[row, position]
                axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
                axes.plot(predicted, stood, marker="o", markersize=3, linewidth=1, label=label)
                axes.set_title(f"drafts 1 to {position + 1}" if position else "draft 1", fontsize="small")
                axes.set(xlim=(0, 1), ylim=(0, 1))
        grid[row, 0].set_ylabel(f"{name}\nstood", fontsize="small")
        grid[row, 0].legend(fontsize="small")
    figure.supxlabel("predicted chance (15 bins of equal mass)")
    figure.savefig(path, dpi=110)


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)


def fitted(drafter: str, temperature: float, drafts: int) -> np.ndarray:
    """float64 [3, drafts]: the scales of a drafter's evidence at a temperature of sampling, as they are when drafting."""
    path = _folder(drafter)
    calibration = {} if path is None else read_folder(path).calibration
    return spread_out(calibration, int(bucket_of(np.array([temperature]))[0]), drafts)


def _folder(drafter: str) -> Path | None:
    """Of a folder or a registered drafter."""
    places = (Path(drafter), *(place / drafter for place in registry_folders()))
    return next((path for path in places if (path / "config.json").is_file()), None)


def _name(drafter: str) -> str:
    path = _folder(drafter)
    return drafter if path is None else read_folder(path).name
