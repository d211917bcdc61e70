"""How a training went, drawn from its log. No torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def plot(folder: Path) -> Path | None:
    """`loss.png` from `log.jsonl`; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    held = [(row["step"], row["held_length"]) for row in rows if "held_length" in row]
    figure = Figure(figsize=(14 if held else 9, 4), layout="constrained")
    of_loss, of_slots, *of_held = figure.subplots(1, 3 if held else 2)
    width = max(len(rows) // 50, 1)
    steps = _smoothed([row["step"] for row in rows], width)
    for name in ("loss", "kl", "tv", "confidence"):
        of_loss.plot(steps, _smoothed([row[name] for row in rows], width), label=name, linewidth=1)
    of_loss.set(title="loss", yscale="log")
    for slot in range(len(rows[0]["acceptance"])):
        chances = [row["acceptance"][slot] for row in rows]
        of_slots.plot(steps, _smoothed(chances, width), label=f"slot {slot + 1}", linewidth=1)
    of_slots.set(title="chance of acceptance, given the slots before", ylim=(0, 1))
    for axes in of_held:
        for name in held[-1][1]:
            lengths = [lengths[name] for _, lengths in held]
            axes.plot([step for step, _ in held], lengths, marker="o", label=name, linewidth=2.5 if name == "macro" else 1)
        axes.set(title="tokens a step on held-out prompts, temperature 0")
    for axes in (of_loss, of_slots):
        axes.set_title(f"{axes.get_title()} (means of {width} steps)", fontsize="medium")
    for axes in (of_loss, of_slots, *of_held):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _smoothed(values: list[float], width: int) -> list[float]:
    """Means of `width` values in a row, a last shorter group included."""
    return [sum(part) / len(part) for start in range(0, len(values), width) if (part := values[start : start + width])]
