"""The loop: random anchors of random texts, AdamW, checkpoints that a killed run goes on from, a log and a plot."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from engine.training.losses import block_losses
from engine.training.module import BlockModule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.batch import FrozenParts
    from engine.checkpoints.drafters.specs import BlockSpec
    from engine.training.losses import Losses
    from engine.training.states import States, StateStore


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """steps: optimiser steps of `texts` texts with `anchors` blocks each. decay: of the slots' weights, in slots."""

    steps: int
    texts: int = 4
    anchors: int = 32
    max_length: int = 768
    learning_rate: float = 6e-4
    warmup: float = 0.04
    decay: float = 4.0
    checkpoint_every: int = 50
    seed: int = 0


class Trainer:
    """folder: gets `state.pt`, `log.jsonl` and `loss.png`. All randomness is a function of (seed, step): a resumed run is the same."""

    def __init__(self, spec: BlockSpec, frozen: FrozenParts, store: StateStore, folder: Path, config: TrainConfig) -> None:
        self._spec, self._frozen, self._store, self._folder, self._config = spec, frozen, store, folder, config
        # The packed product of inference has no gradient; its rows are read back through it.
        self._head = frozen.head(torch.eye(spec.layers.hidden_size, dtype=frozen.embedding.dtype)).T.contiguous()
        self._names = store.names()
        if not self._names:
            raise ValueError(f"there are no hidden states to train on in {folder}")
        self.module = BlockModule(spec, config.seed)
        self._optimizer = torch.optim.AdamW(self.module.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.step = 0
        self._state = folder / "state.pt"
        if self._state.exists():
            self._resume()

    def train(self, tell: Callable[[str], None]) -> None:
        """Runs to `config.steps`, from wherever an earlier run stopped."""
        while self.step < self._config.steps:
            started = time.perf_counter()
            losses = self._one_step()
            self.step += 1
            seconds = time.perf_counter() - started
            entry = {
                "step": self.step,
                "loss": round(float(losses.total.detach()), 5),
                "ce": round(losses.ce, 5),
                "tv": round(losses.tv, 5),
                "confidence": round(losses.confidence, 5),
                "acceptance": [round(value, 4) for value in losses.acceptance.tolist()],
                "seconds": round(seconds, 3),
            }
            with (self._folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            if self.step % self._config.checkpoint_every == 0 or self.step == self._config.steps:
                self._save()
                first = float(losses.acceptance[0])
                tell(f"step {self.step} of {self._config.steps}: loss {entry['loss']}, first slot accepted {first:.3f}, {seconds:.2f} s")

    def _one_step(self) -> Losses:
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        self._optimizer.zero_grad(set_to_none=True)
        count = self._config.texts
        chosen = torch.randint(len(self._names), (count,), generator=generator).tolist()
        losses: list[Losses] = []
        for index in chosen:
            found = self._losses(self._store.load(self._names[index]), generator)
            if found is not None:
                (found.total / count).backward()
                losses.append(found)
        if not losses:
            raise ValueError("no text has an answer of two tokens or more: generate longer answers")
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self._optimizer.step()
        return _mean(losses)

    def _losses(self, states: States, generator: torch.Generator) -> Losses | None:
        """Of one text; None where its answer is too short."""
        spec = self._spec
        length = min(len(states.tokens), self._config.max_length)
        first = max(states.prompt_length - 1, 0)
        room = length - 1 - first
        if room < 1:
            return None
        anchors = (first + torch.randperm(room, generator=generator)[: self._config.anchors]).sort().values
        slots = torch.arange(spec.block_size)
        place = anchors[:, None] + slots
        inputs = torch.where(slots == 0, states.tokens[anchors][:, None], spec.mask_token_id)
        embedded = self._frozen.embedding[inputs].float()
        hidden = self.module(states.taps[:length], embedded, anchors)
        if not spec.predicts_next:
            hidden, place = hidden[:, 1:], place[:, :-1]
        valid = place + 1 < length
        held = place.clamp(max=length - 2)
        targets = states.tokens[held + 1]
        count, width = targets.shape
        base = functional.linear(hidden.reshape(count * width, -1), self._head).view(count, width, -1)
        with torch.no_grad():
            wanted = functional.linear(states.final[held].reshape(count * width, -1), self._head).view(count, width, -1)
        logits, confidence = self.module.sequential(base, hidden, states.tokens[held])
        return block_losses(logits, confidence, wanted, targets, valid, self._config.decay)

    def _rate(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        config = self._config
        warm = max(int(config.steps * config.warmup), 1)
        if self.step < warm:
            return config.learning_rate * (self.step + 1) / warm
        done = (self.step - warm) / max(config.steps - warm, 1)
        return config.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(done, 1.0))))

    def _save(self) -> None:
        part = self._state.with_suffix(".part")
        torch.save({"step": self.step, "module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}, part)
        part.replace(self._state)

    def _resume(self) -> None:
        saved = torch.load(self._state, weights_only=True)
        self.module.load_state_dict(saved["module"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.step = int(saved["step"])
        # What was logged after the checkpoint is about to be logged again.
        log = self._folder / "log.jsonl"
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[: self.step]
        log.write_text("".join(kept), encoding="utf-8")


def plot(folder: Path) -> Path | None:
    """`loss.png` from `log.jsonl`; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for name in ("loss", "ce", "tv", "confidence"):
        left.plot(steps, [row[name] for row in rows], label=name, linewidth=1)
    for slot in range(len(rows[0]["acceptance"])):
        right.plot(steps, [row["acceptance"][slot] for row in rows], label=f"slot {slot + 1}", linewidth=1)
    left.set(xlabel="step", title="loss")
    right.set(xlabel="step", title="chance of acceptance, given the slots before", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(fontsize="small")
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _mean(losses: list[Losses]) -> Losses:
    from engine.training.losses import Losses as Result

    count = len(losses)
    return Result(
        torch.stack([one.total.detach() for one in losses]).mean(),
        sum(one.ce for one in losses) / count,
        sum(one.tv for one in losses) / count,
        sum(one.confidence for one in losses) / count,
        torch.stack([one.acceptance for one in losses]).mean(0),
    )
