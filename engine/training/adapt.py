"""A drafter that learns from a job's own outputs while the job runs, and takes the place of the old one only where it drafts better.

The hidden states are there already: they are kept, for a few requests at a time, as the steps bring them. Training and judging run in a
thread that gets what the job leaves of the processor. Of the finished texts every fourth is never trained on: on those, new and old weights
are compared text by text, and the new ones are handed over where they bring more tokens a block with 95% confidence.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
import torch

from engine.batch import NORMALISED
from engine.training.states import States
from engine.training.trainer import TrainConfig, Trainer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from engine.batch import FrozenParts
    from engine.checkpoints.drafters.specs import BlockSpec
    from engine.drafters.base import Drafter, Progress
    from engine.sequence import Sequence

_log = logging.getLogger(__name__)

_JUDGED_EVERY = 4
_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig:
    """texts: finished texts that a round of training waits for. kept: texts held at most, the oldest go first.

    watched: requests whose states are kept at a time. max_length: a longer text is kept up to here. steps: of a round.
    """

    texts: int = 32
    kept: int = 128
    watched: int = 8
    max_length: int = 512
    steps: int = 60
    learning_rate: float = 2e-4


class KeptTexts:
    """A store of states in memory (`Trainer` reads it as it reads a `StateStore`)."""

    def __init__(self, texts: Mapping[str, States]) -> None:
        self._texts = dict(texts)

    def names(self) -> list[str]:
        return sorted(self._texts)

    def load_all(self, names: Iterable[str]) -> list[States]:
        return [self._texts[name] for name in names]

    def tokens(self, name: str) -> torch.Tensor:
        return self._texts[name].tokens


class Collector:
    """Keeps the hidden states of some running requests, and of those that finished whole. Driven by the engine's thread."""

    def __init__(self, taps: tuple[int, ...], config: AdaptConfig) -> None:
        self._order = taps
        self.taps = (*sorted(set(taps)), NORMALISED)
        self._config = config
        self._running: dict[int, list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]] = {}
        self._passed_over: set[int] = set()
        self._texts: OrderedDict[str, States] = OrderedDict()
        self.finished = 0

    def observe(self, progress: Progress) -> None:
        for index, chunk in enumerate(progress.chunks):
            serial, count = chunk.sequence.serial, int(progress.valid[index])
            if not count or not self._follows(serial):
                continue
            first = int(progress.query_start[index])
            rows = slice(first, first + count)
            taps = torch.cat([progress.taps[tap][rows] for tap in self._order], dim=-1).half().cpu()
            final = progress.taps[NORMALISED][rows].half().cpu()
            self._running[serial].append((np.asarray(progress.positions[rows]).copy(), taps, final))

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        self._passed_over.discard(sequence.serial)
        parts = self._running.pop(sequence.serial, [])
        if not complete or not parts:
            return
        positions = np.concatenate([part[0] for part in parts])
        if (np.diff(positions) != 1).any():  # preempted in between: its states come in pieces
            return
        first, count = int(positions[0]), min(len(positions), self._config.max_length)
        tokens = torch.from_numpy(np.asarray(sequence.tokens[first : first + count], np.int64).copy())
        prompt = max(sequence.prompt_length - first, 1)
        if prompt + 2 > len(tokens):
            return
        taps, final = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
        self._texts[f"{self.finished:08}"] = States(tokens, prompt, taps[: len(tokens)], final[: len(tokens)])
        self.finished += 1
        while len(self._texts) > self._config.kept:
            self._texts.popitem(last=False)

    def texts(self) -> dict[str, States]:
        return dict(self._texts)

    def _follows(self, serial: int) -> bool:
        """Whether a request's states are kept; decided when it is first seen, for what comes later alone is no text."""
        if serial in self._running:
            return True
        if serial in self._passed_over:
            return False
        if len(self._running) >= self._config.watched:
            self._passed_over.add(serial)
            return False
        self._running[serial] = []
        return True


def adapter_for(drafters: Mapping[str, Drafter], frozen: FrozenParts, *, seed: int = 0) -> tuple[str, Adapter] | None:
    """The name of the first of `drafters` that can learn, and what teaches it; None where there is none. frozen: the target's."""
    from engine.drafters.dspark import DSparkDrafter

    for name, drafter in drafters.items():
        if isinstance(drafter, DSparkDrafter) and drafter.folder is not None and adaptable(drafter.spec):
            return name, Adapter(drafter.spec, drafter.folder.tensors(), frozen, seed=seed)
    _log.warning("adapt: no drafter in use can learn from this job's answers")
    return None


def adaptable(spec: BlockSpec) -> bool:
    """Whether the trainable module knows these layers: Qwen3's, without windows, as DeepSpec's DSpark and DFlash for Llama and Qwen."""
    return spec.format == "deepspec" and not spec.layers.sandwich and not any(spec.windows)


class Adapter:
    """Trains beside a running job. `take` gives weights that were found better, once each; everything else is between its two halves."""

    def __init__(
        self, spec: BlockSpec, tensors: dict[str, torch.Tensor], frozen: FrozenParts, config: AdaptConfig | None = None, *, seed: int = 0
    ) -> None:
        """tensors: what the drafter runs with now, by DeepSpec's names."""
        self._config = config or AdaptConfig()
        self.collector = Collector(spec.taps, self._config)
        self._spec, self._frozen, self._seed = spec, frozen, seed
        self._tensors = {name: tensor.float() for name, tensor in tensors.items() if name not in spec.stored}
        self._thread: threading.Thread | None = None
        self._better: dict[str, torch.Tensor] | None = None
        self._trained_at = 0
        self.rounds = 0
        self.swaps = 0

    def tend(self) -> dict[str, torch.Tensor] | None:
        """Starts a round where enough new texts finished. Returns better weights where a round found some."""
        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread = None
        better, self._better = self._better, None
        if better is not None:
            self.swaps += 1
            return better
        if self.collector.finished - self._trained_at >= self._config.texts:
            self._trained_at = self.collector.finished
            self._thread = threading.Thread(target=self._round, args=(self.collector.texts(),), name="adapt", daemon=True)
            self._thread.start()
        return None

    def join(self) -> None:
        """Waits for the round under way."""
        if self._thread is not None:
            self._thread.join()

    def _round(self, texts: dict[str, States]) -> None:
        _yield_to_others()
        try:
            better = self.improve(texts)
        except (RuntimeError, ValueError, MemoryError) as error:
            _log.warning("a round of adapting the drafter failed: %s", error)
            return
        self.rounds += 1
        if better is not None:
            self._tensors, self._better = better, better

    def improve(self, texts: Mapping[str, States]) -> dict[str, torch.Tensor] | None:
        """Trains on three quarters of the texts; the new weights where they are better on the rest, else None."""
        # By a hash: jobs have patterns in the order of their lines.
        judged = {name: states for name, states in texts.items() if crc32(name.encode()) % _JUDGED_EVERY == 0}
        learned = {name: states for name, states in texts.items() if name not in judged}
        if not learned or not judged:
            return None
        config, steps = self._config, self._config.steps
        plan = TrainConfig(
            steps=steps, texts=4, anchors=64, max_length=config.max_length, learning_rate=config.learning_rate, checkpoint_every=steps + 1,
            seed=self._seed + self.rounds,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(self._spec, self._frozen, KeptTexts(learned), Path(folder), plan, KeptTexts(judged), workers=1)
            trainer.module.load_tensors(self._tensors)
            before = trainer.held_lengths()
            trainer.train()
            after = trainer.held_lengths()
        surely = better_by(np.array(before), np.array(after))
        _log.info("adapted drafter: %.3f tokens a block before, %.3f after, at least %+.3f", np.mean(before), np.mean(after), surely)
        return {name: tensor.clone() for name, tensor in trainer.module.tensors().items()} if surely > 0.0 else None


def better_by(before: np.ndarray, after: np.ndarray) -> float:
    """What the mean of paired figures rose by at least, with 95% confidence (bootstrap)."""
    gain = after - before
    drawn = np.random.default_rng(0).integers(0, len(gain), (_DRAWS, len(gain)))
    return float(np.quantile(gain[drawn].mean(axis=1), 0.05))


def _yield_to_others() -> None:
    """The calling thread runs when nothing else wants to, where the system knows such a thing."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
