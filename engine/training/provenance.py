"""Which prompts a drafter was made from, as digests beside it: anyone can check, without the prompts, that what it is judged by stayed out.

A prompt's digest also says whether it may train: the choice is a function of the digest alone (`prompts.part_of_digest`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from engine.training.prompts import digest, may_calibrate, may_train, part_of_digest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FILE = "prompts.json"
TRAINED, CALIBRATED, JUDGED, BENCHMARKS = "trained", "calibrated", "judged", "benchmarks"

Provenance = dict[str, list[str]]
"""Ascending digests by use; `benchmarks` are those that were asked to stay out, whatever their digest."""


def read_provenance(folder: Path) -> Provenance:
    """Empty where the drafter has no such record."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def note_prompts(folder: Path, **texts: Iterable[str]) -> Provenance:
    """Adds prompts to the drafter's record, by use (`trained`, `calibrated`, `judged`, `benchmarks`)."""
    record = read_provenance(folder)
    for use, given in texts.items():
        record[use] = sorted({*record.get(use, ()), *map(digest, given)})
    (folder / FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def leaks(record: Provenance) -> list[str]:
    """What is wrong, one line each: a prompt that was trained on, calibrated on or judged by against the rule."""
    benchmarks, trained, calibrated = (set(record.get(use, ())) for use in (BENCHMARKS, TRAINED, CALIBRATED))
    wrong = {
        "benchmark prompts were trained on": trained & benchmarks,
        "benchmark prompts were calibrated on": calibrated & benchmarks,
        "prompts outside of the training part were trained on": {one for one in trained if not may_train(part_of_digest(one))},
        "prompts outside of the calibration part were calibrated on": {one for one in calibrated if not may_calibrate(part_of_digest(one))},
        "judged prompts were trained or calibrated on": set(record.get(JUDGED, ())) & (trained | calibrated),
    }
    return [f"{len(found)} {what}: {', '.join(sorted(found)[:3])}" for what, found in wrong.items() if found]
