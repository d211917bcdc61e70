"""`longdraft drafter train` from prompts to a calibrated drafter folder; every stage goes on from what an interrupted run left."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.folder import read_folder
from engine.checkpoints.drafters.formats import block_spec
from engine.checkpoints.tensors import read_tensors
from engine.config import EngineConfig
from engine.drafters.parts.confidence import bucket_of
from engine.engine import Engine
from engine.training.answers import answer, read
from engine.training.calibrate import fit, quality
from engine.training.evaluate import measure
from engine.training.export import new_config, set_calibration, write_folder, write_record
from engine.training.prompts import split
from engine.training.states import StateStore
from engine.training.trainer import TrainConfig, Trainer, plot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from engine.checkpoints import LoadedModel
    from engine.training.prompts import Prompt, Split

_WATCHED = 64
"""Prompts whose acceptance length is followed while training: of those that calibrate, so that none is trained on or judged by."""
FITTED_AT = (0.0, 1.0)
"""Temperatures whose buckets are calibrated; the others begin uncalibrated and learn from every outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Size of the drafter and of its training data. intermediate_size 0: twice the hidden size. rank 0: DFlash."""

    layers: int = 2
    block_size: int = 7
    rank: int = 64
    head: str = "vanilla"
    intermediate_size: int = 0
    samples: int = 2
    temperature: float = 0.8
    max_tokens: int = 384
    disk_bytes: int = 8 << 30


def train(
    loaded: LoadedModel,
    prompts: Iterable[Prompt],
    out: Path,
    *,
    recipe: Recipe,
    config: TrainConfig,
    benchmarks: Iterable[str] = (),
    data: Path | None = None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Writes a drafter to `out` and its work to `out`/training; returns the training record. Raises DrafterError for unusable input.

    data: folder of answers and hidden states (`out`/training where None). What another run of this target left there is used; with the
    same prompts nothing is generated twice.
    """
    parts = split(prompts, benchmarks)
    if not parts.train:
        raise DrafterError("no prompt is left to train on: a hash-chosen fifth is kept for calibration and judging; give more prompts")
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    data = data or work
    data.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    engine = Engine(loaded, EngineConfig(drafter="suffix", seed=config.seed))
    generate(engine, parts, data, recipe=recipe, tell=tell)
    del engine
    store_states(loaded, data, recipe, tell)
    record = fit_drafter(loaded, data, out, recipe=recipe, config=config, tell=tell)
    counts = {"trained": len(parts.train), "calibrated": len(parts.calibrate), "kept": len(parts.judged)}
    record |= {"prompts": counts, "seconds": round(time.monotonic() - started, 1)}
    write_record(out, record)
    if parts.calibrate:
        calibrate(loaded, out, parts.calibrate, max_tokens=recipe.max_tokens, tell=tell)
    return record


def generate(engine: Engine, parts: Split, data: Path, *, recipe: Recipe, tell: Callable[[str], None]) -> None:
    """The target's own answers: `recipe.samples` to each prompt that trains, and a greedy one to those that only show how training goes."""
    samples, length = recipe.samples, recipe.max_tokens
    answer(engine, parts.train, data / "answers.jsonl", samples=samples, temperature=recipe.temperature, max_tokens=length, tell=tell)
    answer(engine, parts.calibrate[:_WATCHED], data / "held.jsonl", samples=1, temperature=0.0, max_tokens=length, tell=tell)


def store_states(loaded: LoadedModel, data: Path, recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Hidden states of every answer that lacks them."""
    taps = block_spec(drafter_config(loaded, recipe)).taps
    for texts, states in (("answers.jsonl", "states"), ("held.jsonl", "held")):
        if (data / texts).exists():
            StateStore(data / states, recipe.disk_bytes).write(read(data / texts), loaded.model, taps, tell)


def fit_drafter(
    loaded: LoadedModel, data: Path, out: Path, *, recipe: Recipe, config: TrainConfig, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Trains on the hidden states in `data` and writes the drafter to `out`; goes on from a checkpoint in `out`/training."""
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    shape = drafter_config(loaded, recipe)
    store, held = StateStore(data / "states", recipe.disk_bytes), StateStore(data / "held", recipe.disk_bytes)
    target = read_tensors(loaded.directory)
    trainer = Trainer(block_spec(shape), loaded.model.frozen(), store, work, config, held if held.names() else None, target)
    trainer.train(tell)
    plot(work)
    record = {
        "name": out.name,
        "target": loaded.model.spec.name,
        "target_revision": loaded.model.spec.revision,
        "recipe": asdict(recipe),
        "training": asdict(config),
        "device": loaded.model.spec.device.type,
        "texts": len(store.names()),
        "steps": trainer.step,
        "last": json.loads((work / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]),
    }
    write_folder(out, shape, trainer.module.tensors(), record)
    return record


def calibrate(
    loaded: LoadedModel, folder: Path, prompts: Sequence[Prompt], *, max_tokens: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Fits one temperature a position and bucket on these prompts and writes them beside the drafter; returns what was written.

    Raises DrafterError for a drafter without a confidence head.
    """
    found = read_folder(folder)
    spec = block_spec(found.config)
    if not spec.confidence:
        raise DrafterError(f"{folder} has no confidence head: there is nothing to calibrate")
    temperatures: dict[str, list[float]] = {}
    quality_of: dict[str, dict[str, Any]] = {}
    for temperature in FITTED_AT:
        got = measure(loaded, str(folder), prompts, temperature=temperature, drafts=spec.drafts_per_block, max_tokens=max_tokens)
        if not len(got.logits):
            tell(f"calibration at temperature {temperature}: no whole block was drafted, so nothing is fitted")
            continue
        bucket = str(int(bucket_of(np.array([temperature]))[0]))
        scales = fit(got.logits, got.stood)
        before, after = quality(got.logits, got.stood), quality(got.logits, got.stood, scales)
        temperatures[bucket] = [round(float(value), 4) for value in scales]
        quality_of[bucket] = {"blocks": len(got.logits), "ece_before": float(before.ece.mean()), "ece_after": float(after.ece.mean())}
        tell(f"calibration at temperature {temperature}: error {before.ece.mean():.4f} before, {after.ece.mean():.4f} after")
    calibration = {"temperatures": temperatures, "fitted": quality_of}
    set_calibration(found, calibration)
    return calibration


def drafter_config(loaded: LoadedModel, recipe: Recipe) -> dict[str, Any]:
    """config.json of a fresh drafter for this target. Raises DrafterError where the target's kind does not suit."""
    target = json.loads((loaded.directory / "config.json").read_text(encoding="utf-8"))
    layers = loaded.model.spec.num_layers
    # From near the input to near the output; the last layers only rephrase what those before them know.
    wanted = sorted({max(round(layers * share) - 1, 0) for share in (0.1, 0.3, 0.5, 0.7, 0.9)})
    tokenizer = loaded.tokenizer
    # A token that text hardly holds: where padding is the end-of-turn token, every answer has it.
    mask = next((token for token in (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    try:
        config = new_config(
            target,
            layers=recipe.layers,
            block_size=recipe.block_size,
            rank=recipe.rank,
            head=recipe.head,
            taps=wanted,
            mask_token_id=int(mask),
            intermediate_size=recipe.intermediate_size or 2 * target["hidden_size"],
        )
    except KeyError as error:
        raise DrafterError(
            f"the target's config.json has no {error}; drafters can be trained for models of Llama's or Qwen's kind"
        ) from error
    return config


def evaluate(
    loaded: LoadedModel, drafters: Sequence[str], prompts: Sequence[Prompt], *, drafts: int = 7, max_tokens: int = 256
) -> dict[str, dict[str, float | None]]:
    """Acceptance length (bonus token included, temperature 0) by domain, `macro` their mean, and the calibration error before and after.

    The error is the mean over positions; None for drafters without a confidence head.
    """
    report: dict[str, dict[str, float | None]] = {}
    for drafter in drafters:
        got = measure(loaded, drafter, prompts, drafts=drafts, max_tokens=max_tokens)
        row: dict[str, float | None] = {domain: round(value, 4) for domain, value in got.acceptance.items()}
        row["macro"] = round(sum(got.acceptance.values()) / len(got.acceptance), 4) if got.acceptance else None
        row |= _errors(drafter, got.logits, got.stood)
        report[_name(drafter)] = row
    return report


def _errors(drafter: str, logits: np.ndarray, stood: np.ndarray) -> dict[str, float | None]:
    if not len(logits):
        return {"ece_before": None, "ece_after": None}
    path = Path(drafter)
    fitted = read_folder(path).calibration.get("temperatures", {}).get("0") if path.is_dir() else None
    scales = np.ones(logits.shape[1])
    if fitted:
        scales[: len(fitted)] = fitted[: len(scales)]
    before, after = quality(logits, stood), quality(logits, stood, scales)
    return {"ece_before": round(float(before.ece.mean()), 5), "ece_after": round(float(after.ece.mean()), 5)}


def _name(drafter: str) -> str:
    path = Path(drafter)
    return read_folder(path).name if path.is_dir() else drafter
