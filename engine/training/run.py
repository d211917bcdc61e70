"""`longdraft drafter train` from prompts to a calibrated drafter folder; every stage goes on from what an interrupted run left."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.folder import read_folder
from engine.checkpoints.drafters.formats import block_spec
from engine.checkpoints.tensors import read_tensors
from engine.config import EngineConfig
from engine.drafters.parts.confidence import CHAINED, SCALES, bucket_of
from engine.engine import Engine
from engine.training.answers import answer, hash_of, read
from engine.training.calibrate import fit, quality, survival
from engine.training.curves import plot
from engine.training.evaluate import measure
from engine.training.export import new_config, set_calibration, write_folder, write_record
from engine.training.own_prompts import invent, with_own
from engine.training.prompts import balanced, split, spread
from engine.training.provenance import note_prompts
from engine.training.report import SILENT
from engine.training.states import LiveStates, StateStore
from engine.training.trainer import TrainConfig, Trainer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from engine.checkpoints import LoadedModel
    from engine.profile import Profiles
    from engine.training.prompts import Prompt, Split
    from engine.training.provenance import Provenance
    from engine.training.report import Report
    from engine.training.trainer import Texts

_ANSWERS = {"states": "answers.jsonl", "held": "held.jsonl"}
"""Where the texts lie whose hidden states a folder of that name holds."""
_WATCHED_EACH = 8
"""Prompts of each domain whose acceptance length is followed while training; none of them is trained on or judged by."""
_CALIBRATED_EACH = 200
"""Prompts of each domain that fit the confidence, at most: how sure a drafter may be differs by domain, and most prompts may be of one."""
FITTED_AT = (0.0, 1.0)
"""Temperatures whose buckets are calibrated; the others begin uncalibrated and learn from every outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Size of the drafter and of its training data. intermediate_size 0: twice the hidden size. rank 0: DFlash.

    own_prompts: so many prompts of the model's own for each domain (`engine.training.own_prompts`).
    """

    layers: int = 2
    block_size: int = 7
    rank: int = 64
    head: str = "vanilla"
    intermediate_size: int = 0
    samples: int = 2
    own_prompts: int = 0
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
    generate_missing: bool = True,
    profiles: Profiles | None = None,
    report: Report = SILENT,
) -> dict[str, Any]:
    """Writes a drafter to `out` and its work to `out`/training; returns the training record. Raises DrafterError for unusable input.

    data: folder of answers and hidden states (`out`/training where None). What another run of this target left there is used; with the
    same prompts nothing is generated twice, and without `generate_missing` nothing at all. Answers to prompts that are to stay out are an
    error. profiles: where this machine's step times are kept; measured anew where None.
    """
    benchmarks = list(benchmarks)
    parts = split(prompts, benchmarks)
    if not parts.train:
        raise DrafterError("no prompt is left to train on: a hash-chosen fifth is kept for calibration and judging; give more prompts")
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    data = data or work
    data.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    engine = Engine(loaded, EngineConfig(drafter="suffix", seed=config.seed), profiles) if generate_missing else None
    if engine is not None:
        invent(engine, parts, recipe.own_prompts, data, barred=benchmarks, seed=config.seed, report=report)
    parts = with_own(parts, data)
    if engine is not None:
        generate(engine, parts, data, recipe=recipe, report=report)
        del engine
    check_answers(parts, data)
    store_states(loaded, data, recipe, report)
    domains = {hash_of(prompt.text): prompt.domain for prompt in (*parts.train, *parts.calibrate)}
    record = fit_drafter(loaded, data, out, recipe=recipe, config=config, domains=domains, report=report)
    counts = {"trained": len(parts.train), "calibrated": len(parts.calibrate), "kept": len(parts.judged)}
    record |= {"prompts": counts, "seconds": round(time.monotonic() - started, 1)}
    write_record(out, record)
    note_trained(out, parts, data, benchmarks)
    if parts.calibrate:
        calibrate(loaded, out, spread(parts.calibrate, _CALIBRATED_EACH), max_tokens=recipe.max_tokens, profiles=profiles, report=report)
    return record


def generate(engine: Engine, parts: Split, data: Path, *, recipe: Recipe, report: Report) -> None:
    """The target's own answers: `recipe.samples` to each prompt that trains, and a greedy one to those that only show how training goes."""
    samples, length = recipe.samples, recipe.max_tokens
    answer(engine, parts.train, data / "answers.jsonl", samples=samples, temperature=recipe.temperature, max_tokens=length, report=report)
    watched = balanced(parts.calibrate, _WATCHED_EACH)
    answer(engine, watched, data / "held.jsonl", samples=1, temperature=0.0, max_tokens=length, report=report)


def check_answers(parts: Split, data: Path) -> None:
    """Raises DrafterError where an answer in `data`, or its hidden states, are of no prompt that may be trained on."""
    allowed = {hash_of(prompt.text) for prompt in parts.train}
    path = data / "answers.jsonl"
    there = {text.id for text in read(path)} if path.exists() else set()
    there.update(state.stem for state in (data / "states").glob("*.safetensors"))
    if foreign := {name for name in there if name.split("-")[1] not in allowed}:
        raise DrafterError(f"{data} holds {len(foreign)} answers to prompts that are not trained on ({min(foreign)}); use another --data")


def note_trained(folder: Path, parts: Split, data: Path, benchmarks: Iterable[str]) -> Provenance:
    """Records beside a drafter what it was trained on (the prompts whose answers or hidden states lie in `data`) and followed by, and what
    had to stay out."""
    used = {name.split("-")[1] for kind in ("states", "held") for name in _texts_of(data, kind)}
    return note_prompts(
        folder,
        trained=[prompt.text for prompt in parts.train if hash_of(prompt.text) in used],
        calibrated=[prompt.text for prompt in parts.calibrate if hash_of(prompt.text) in used],
        benchmarks=benchmarks,
    )


def store_states(loaded: LoadedModel, data: Path, recipe: Recipe, report: Report) -> None:
    """Hidden states of every answer that lacks them; none on an accelerator, which makes them anew sooner than a disk gives them."""
    if loaded.model.spec.device.type != "cpu":
        return
    taps = block_spec(drafter_config(loaded, recipe)).taps
    for kind, texts in _ANSWERS.items():
        if (data / texts).exists():
            StateStore(data / kind, recipe.disk_bytes).write(read(data / texts), loaded.model, taps, report)


def _states(loaded: LoadedModel, data: Path, kind: str, taps: tuple[int, ...], max_length: int, disk_bytes: int) -> Texts:
    if loaded.model.spec.device.type == "cpu":
        return StateStore(data / kind, disk_bytes)
    path = data / _ANSWERS[kind]
    return LiveStates(read(path) if path.exists() else (), loaded.model, taps, max_length)


def _texts_of(data: Path, kind: str) -> set[str]:
    """Names of the texts whose states are stored, or where none are, of all answers."""
    stored = {path.stem for path in (data / kind).glob("*.safetensors")}
    path = data / _ANSWERS[kind]
    return stored or ({text.id for text in read(path)} if path.exists() else set())


def fit_drafter(
    loaded: LoadedModel,
    data: Path,
    out: Path,
    *,
    recipe: Recipe,
    config: TrainConfig,
    domains: Mapping[str, str] | None = None,
    report: Report = SILENT,
) -> dict[str, Any]:
    """Trains on the hidden states in `data` and writes the drafter to `out`; goes on from a checkpoint in `out`/training.

    domains: by the hash of a prompt; answers of all domains are drawn alike. One domain where None.
    """
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    shape = drafter_config(loaded, recipe)
    spec = block_spec(shape)
    store, held = (_states(loaded, data, kind, spec.taps, config.max_length, recipe.disk_bytes) for kind in ("states", "held"))
    target = read_tensors(loaded.directory)
    watched = held if held.names() else None
    domain_of = {name: (domains or {}).get(name.split("-")[1], "other") for name in (*store.names(), *held.names())}
    trainer = Trainer(spec, loaded.model.frozen(), store, work, config, watched, target, domain_of=domain_of)
    trainer.train(report)
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
    loaded: LoadedModel,
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    profiles: Profiles | None = None,
    report: Report = SILENT,
) -> dict[str, Any]:
    """Fits the scales of every position and bucket (`parts.confidence`) on these prompts and writes them beside the drafter.

    Returns what was written.

    profiles: where this machine's step times are kept, see `evaluate.measure`.
    Drafts of a second, chained block have temperatures of their own: what it is anchored at is a draft itself.
    A drafter without a confidence head is calibrated by how sharp its distributions are.
    """
    found = read_folder(folder)
    spec = block_spec(found.config)
    calibration: dict[str, dict[str, Any]] = {name: {} for name in SCALES}
    quality_of: dict[str, dict[str, Any]] = {}
    for temperature in FITTED_AT:
        width = spec.drafts_per_block * CHAINED
        tick = partial(report.tick, f"calibration at temperature {temperature:g}")
        got = measure(
            loaded, str(folder), prompts, temperature=temperature, drafts=width, max_tokens=max_tokens, profiles=profiles, tick=tick
        )
        if not len(got.stood):
            report.tell(f"calibration at temperature {temperature}: no whole block was drafted, so nothing is fitted")
            continue
        bucket = str(int(bucket_of(np.array([temperature]))[0]))
        scales = fit(got.evidence, got.stood)
        before, after = (quality(survival(got.evidence, one), got.stood) for one in (None, scales))
        for name, row in zip(SCALES, scales, strict=True):
            calibration[name][bucket] = [round(float(value), 4) for value in row]
        quality_of[bucket] = {"blocks": len(got.stood), "ece_before": float(before.ece.mean()), "ece_after": float(after.ece.mean())}
        report.tell(f"calibration at temperature {temperature}: error {before.ece.mean():.4f} before, {after.ece.mean():.4f} after")
    calibration["fitted"] = quality_of
    set_calibration(found, calibration)
    note_prompts(folder, calibrated=[prompt.text for prompt in prompts])
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
