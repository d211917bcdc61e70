"""The loop: random anchors of random texts, AdamW, checkpoints that a killed run goes on from, a log and a plot."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from engine.training.losses import Losses, block_losses
from engine.training.module import BlockModule
from engine.training.report import SILENT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from engine.batch import FrozenParts
    from engine.checkpoints.drafters.specs import BlockSpec
    from engine.training.report import Report
    from engine.training.states import States


_LOGGED_TOGETHER = 16
"""Steps whose figures are read at once: to read one is to wait for the device."""
_WALKED = 128
"""Blocks at a time of a held-out text; each takes a row of the whole vocabulary a slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """steps: optimiser steps of `texts` texts with `anchors` blocks each. decay: of the slots' weights, in slots.

    vocabulary: how many tokens of the output head a step compares, 0 for all. Of that many, three quarters are the answers' most frequent
    and the rest is drawn anew every step, standing for all others (sampled softmax): most of a step on a CPU is the output head.
    full_from: the share of the run after which it is the whole vocabulary all the same.
    seconds: the run also ends after so long, of all its tries together, and the learning rate falls with whichever is nearer. Such a run
    depends on the machine's speed and is not repeatable.
    """

    steps: int
    texts: int = 4
    anchors: int = 32
    max_length: int = 768
    learning_rate: float = 6e-4
    warmup: float = 0.04
    decay: float = 4.0
    checkpoint_every: int = 50
    seed: int = 0
    vocabulary: int = 0
    full_from: float = 0.9
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Blocks:
    """logits and wanted (the target's) [N, G, vocab], confidence [N, G], targets int64 (the text's own tokens) and valid bool [N, G]; N
    anchors a text.
    """

    logits: torch.Tensor
    confidence: torch.Tensor | None
    wanted: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Columns:
    """tokens: int64 [C]. offset: [C], added to logits. head: [C, hidden]."""

    tokens: torch.Tensor
    offset: torch.Tensor
    head: torch.Tensor


class Texts(Protocol):
    """Where hidden states come from: a `StateStore`, memory, or the target itself."""

    def names(self) -> list[str]: ...

    def load_all(self, names: Sequence[str]) -> list[States]: ...

    def tokens(self, name: str) -> torch.Tensor: ...


class Trainer:
    """folder: gets `state.pt` and `log.jsonl`. All randomness is a function of (seed, step): a resumed run is the same.

    Trains where the target's embedding lies; where bfloat16 is fast, products are in it, and weights, norms, losses and the optimiser in
    float32.
    held: states of greedily answered prompts that are not trained on; at every checkpoint the log gets their acceptance length.
    domain_of: by a text's name; texts of all domains are drawn alike, however many each has. None: every text alike.
    """

    def __init__(
        self,
        spec: BlockSpec,
        frozen: FrozenParts,
        store: Texts,
        folder: Path,
        config: TrainConfig,
        held: Texts | None = None,
        target: dict[str, torch.Tensor] | None = None,
        workers: int | None = None,
        domain_of: Mapping[str, str] | None = None,
    ) -> None:
        """target: tensors of its checkpoint to begin with (`BlockModule.start_from`). workers: texts at a time; None: one a thread."""
        self._spec, self._store, self._folder, self._config, self._held = spec, store, folder, config, held
        self._device = frozen.embedding.device
        self._dtype = torch.bfloat16 if _bfloat16_is_fast(self._device) else torch.float32
        # A step's matrices are small: two cores do more with texts of their own than with both at one product.
        on_cpu = self._device.type == "cpu"
        self._workers = workers or (torch.get_num_threads() if on_cpu else 1)
        self._together = -(-config.texts // self._workers)
        self._embedding = frozen.embedding.to(self._dtype)
        self._head = frozen.head_weight().to(self._dtype)
        self._names = store.names()
        if not self._names:
            raise ValueError(f"there are no hidden states to train on in {folder}")
        self._domain_of = domain_of or {}
        shares = Counter(self._domain_of.get(name) for name in self._names)
        self._chances = torch.tensor([1.0 / shares[self._domain_of.get(name)] for name in self._names], dtype=torch.float64)
        self.module = BlockModule(spec, config.seed, self._device)
        if target is not None:
            self.module.start_from(target)
        self._parameters = list(self.module.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self._frequent = self._most_frequent() if 0 < config.vocabulary < len(self._head) else None
        self.step = 0
        self._spent = 0.0
        self._unlogged: list[tuple[int, Losses, float]] = []
        self._state = folder / "state.pt"
        if self._state.exists():
            self._resume()

    def train(self, report: Report = SILENT) -> None:
        """Runs to `config.steps`, from wherever an earlier run stopped."""
        if self._workers == 1:
            self._run(report)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._run(report)
        finally:
            torch.set_num_threads(threads)

    def _run(self, report: Report) -> None:
        with ThreadPoolExecutor(1, "states") as reader, ThreadPoolExecutor(self._workers, "texts") as self._pool:
            coming = reader.submit(self._read, self.step)
            while self._progress() < 1.0:
                started = time.perf_counter()
                texts, generator = coming.result()
                coming = reader.submit(self._read, self.step + 1)
                losses = self._one_step(texts, generator)
                self.step += 1
                seconds = time.perf_counter() - started
                self._spent += seconds
                self._unlogged.append((self.step, losses, seconds))
                saved = self.step % self._config.checkpoint_every == 0 or self._progress() >= 1.0
                if saved or len(self._unlogged) >= _LOGGED_TOGETHER:
                    entry = self._log(held=saved)
                if saved:
                    self._save()
                    held = f", held-out length {entry['held_length']['macro']}" if "held_length" in entry else ""
                    report.tell(f"step {self.step}, {entry['seconds']} s: loss {entry['loss']}, length {entry['length']}{held}")
                report.tick("steps", self.step, round(self.step / self._progress()))

    def _log(self, *, held: bool) -> dict[str, Any]:
        """Writes what is not in the log yet; returns the last entry, which with `held` has the held-out lengths."""
        entries = [self._entry(step, losses) | {"seconds": round(seconds, 3)} for step, losses, seconds in self._unlogged]
        self._unlogged.clear()
        if held and self._held is not None:
            entries[-1]["held_length"] = {name: round(length, 4) for name, length in self.held_length().items()}
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(entry) + "\n" for entry in entries)
        return entries[-1]

    def held_length(self) -> dict[str, float]:
        """Mean of `held_lengths` by domain, and `macro`, the mean of the domains."""
        assert self._held is not None
        found: dict[str, list[float]] = {}
        for name, length in zip(self._held.names(), self.held_lengths(), strict=True):
            found.setdefault(self._domain_of.get(name, "other"), []).append(length)
        means = {domain: sum(lengths) / len(lengths) for domain, lengths in sorted(found.items())}
        return means | {"macro": sum(means.values()) / max(len(means), 1)}

    @torch.no_grad()
    def held_lengths(self) -> list[float]:
        """Tokens a step, the bonus token included, that whole blocks bring on each held-out text at temperature 0.

        A text is walked as the engine walks it, a block after what the last one brought: chances averaged over all places would count the
        long runs more often than they are met.
        """
        assert self._held is not None
        found = []
        for name in self._held.names():
            (states,) = self._held.load_all([name])
            room, length = self._room(states), 1.0
            if room:
                runs = [self._runs(states, part) for part in torch.arange(room).split(_WALKED)]
                length = _walk(torch.cat(runs).tolist())
            found.append(length)
        return found

    def _runs(self, states: States, picked: torch.Tensor) -> torch.Tensor:
        """int64 [A]: how many drafts in a row are the text's own, of blocks at `picked`."""
        made = self._forward([(states, picked)], None)
        same = (made.logits.argmax(-1) == made.targets) & made.valid
        return torch.cumprod(same.long(), 1).sum(1)

    def _most_frequent(self) -> torch.Tensor:
        """bool [vocab], on the CPU: three quarters of `config.vocabulary` tokens."""
        counts = torch.zeros(len(self._head), dtype=torch.int64)
        for name in self._names:
            counts += torch.bincount(self._store.tokens(name), minlength=len(counts))
        frequent = torch.zeros(len(counts), dtype=torch.bool)
        frequent[counts.topk(self._config.vocabulary * 3 // 4).indices] = True
        return frequent

    def _columns(self, texts: list[States], generator: torch.Generator) -> _Columns | None:
        """The part of the vocabulary that a step compares; None for all of it. Found on the CPU, so that no device is waited for."""
        if self._frequent is None or self._progress() >= self._config.full_from:
            return None
        certain = self._frequent.clone()
        for states in texts:
            certain[states.tokens] = True
        others = (~certain).nonzero().squeeze(1)
        drawn = others[torch.randperm(len(others), generator=generator)[: self._config.vocabulary // 4]]
        kept = certain.nonzero().squeeze(1)
        tokens = torch.cat((kept, drawn))
        offset = torch.zeros(len(tokens))
        offset[len(kept) :] = math.log(len(others) / max(len(drawn), 1))
        tokens = tokens.to(self._device)
        return _Columns(tokens, offset.to(self._device, self._dtype), self._head[tokens])

    def _read(self, step: int) -> tuple[list[States], torch.Generator]:
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + step)
        chosen = torch.multinomial(self._chances, self._config.texts, replacement=True, generator=generator).tolist()
        return self._store.load_all([self._names[index] for index in chosen]), generator

    def _one_step(self, texts: list[States], generator: torch.Generator) -> Losses:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        columns = self._columns(texts, generator)
        jobs = [
            (states, torch.randperm(room, generator=generator)[: self._config.anchors].sort().values)
            for states in texts
            if (room := self._room(states))
        ]
        if not jobs:
            raise ValueError("no text has an answer of two tokens or more: generate longer answers")

        def work(part: list[tuple[States, torch.Tensor]]) -> tuple[list[torch.Tensor | None], list[Losses]]:
            total: list[torch.Tensor | None] = [None] * len(self._parameters)
            losses = []
            for first in range(0, len(part), self._together):
                group = part[first : first + self._together]
                made = self._forward(group, columns)
                found = block_losses(made.logits, made.confidence, made.wanted, made.valid, self._config.decay)
                gradients = torch.autograd.grad(found.total * (len(group) / len(texts)), self._parameters, allow_unused=True)
                total = [new if old is None else old if new is None else old.add_(new) for old, new in zip(total, gradients, strict=True)]
                losses.append(found)
            return total, losses

        done = list(self._pool.map(work, _shares(jobs, self._workers)))
        for index, parameter in enumerate(self._parameters):
            found = [gradient for gradients, _ in done if (gradient := gradients[index]) is not None]
            parameter.grad = torch.stack(found).sum(0) if len(found) > 1 else next(iter(found), None)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return Losses.mean([one for _, losses in done for one in losses])

    def _room(self, states: States) -> int:
        """How many anchors a text offers: its answer's tokens but the last."""
        return max(min(len(states.tokens), self._config.max_length) - 1 - max(states.prompt_length - 1, 0), 0)

    def _forward(self, jobs: Sequence[tuple[States, torch.Tensor]], columns: _Columns | None) -> _Blocks:
        """Blocks at the picked ones, int64 [A], of each text's anchors; logits of `columns` alone, or of the whole vocabulary.

        Texts with fewer anchors than others get invalid ones.
        """
        spec, device = self._spec, self._device
        lengths = [min(len(states.tokens), self._config.max_length) for states, _ in jobs]
        firsts = [max(states.prompt_length - 1, 0) for states, _ in jobs]
        texts = [states.to(device, self._dtype) for states, _ in jobs]
        tokens, taps = (
            pad_sequence([getattr(states, name)[:length] for states, length in zip(texts, lengths, strict=True)], batch_first=True)
            for name in ("tokens", "taps")
        )
        chosen = pad_sequence([picked for _, picked in jobs], batch_first=True, padding_value=-1)
        *offsets, _ = accumulate((end - start for start, end in zip(firsts, lengths, strict=True)), initial=0)
        length, first, offset = (torch.tensor(values).to(device)[:, None, None] for values in (lengths, firsts, offsets))
        chosen = chosen.to(device)
        anchors = chosen.clamp(min=0) + first[..., 0]
        slots = torch.arange(spec.block_size, device=device)
        place = anchors[..., None] + slots
        inputs = torch.where(slots == 0, tokens.gather(1, anchors)[..., None], spec.mask_token_id)
        real = (chosen >= 0)[..., None]
        with torch.autocast(device.type, torch.bfloat16, enabled=self._dtype != torch.float32, cache_enabled=False):
            hidden = self.module(taps, self._embedding[inputs].float(), anchors)
            if not spec.predicts_next:
                hidden, place = hidden[:, :, 1:], place[..., :-1]
            valid = (place + 1 < length) & real
            held = torch.minimum(place, length - 2)
            head, bias = (self._head, None) if columns is None else (columns.head, columns.offset)
            # The target's distribution is one a position, however many blocks have a slot there.
            final = torch.cat([states.final[start:end] for states, start, end in zip(texts, firsts, lengths, strict=True)])
            wanted = functional.linear(final, head, bias)[(held - first + offset).flatten(0, 1)]
            hidden, held_tokens = hidden.flatten(0, 1), tokens.gather(1, held.flatten(1)).view(-1, held.shape[-1])
            base = functional.linear(hidden, head, bias)
            logits, confidence = self.module.sequential(base, hidden, held_tokens, None if columns is None else columns.tokens)
        targets = tokens.gather(1, held.flatten(1) + 1).view_as(held_tokens)
        return _Blocks(logits, confidence, wanted, targets, valid.flatten(0, 1))

    def _entry(self, step: int, losses: Losses) -> dict[str, Any]:
        values = {"loss": losses.total, "kl": losses.kl, "tv": losses.tv, "confidence": losses.confidence, "length": losses.length}
        entry: dict[str, Any] = {"step": step} | {name: round(float(value), 5) for name, value in values.items()}
        return entry | {"acceptance": [round(value, 4) for value in losses.acceptance.tolist()]}

    def _progress(self) -> float:
        """0 at the start, 1 when it is over."""
        config = self._config
        return max(self.step / config.steps, 0.0 if config.seconds is None else self._spent / config.seconds)

    def _rate(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        config, done = self._config, self._progress()
        warm = max(config.warmup, 1.0 / config.steps)
        if done < warm:
            return config.learning_rate * min((done + 1.0 / config.steps) / warm, 1.0)
        return config.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min((done - warm) / max(1.0 - warm, 1e-9), 1.0))))

    def _save(self) -> None:
        part = self._state.with_suffix(".part")
        torch.save(
            {"step": self.step, "spent": self._spent, "module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}, part
        )
        part.replace(self._state)

    def _resume(self) -> None:
        saved = torch.load(self._state, weights_only=True, map_location=self._device)
        self.module.load_state_dict(saved["module"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.step, self._spent = int(saved["step"]), float(saved["spent"])
        # What was logged after the checkpoint is about to be logged again.
        log = self._folder / "log.jsonl"
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[: self.step]
        log.write_text("".join(kept), encoding="utf-8")


def _walk(runs: list[int]) -> float:
    """Tokens a step over a text where a block at place i has `runs[i]` drafts that stand."""
    place = steps = 0
    while place < len(runs):
        place, steps = place + 1 + runs[place], steps + 1
    return place / steps


def _bfloat16_is_fast(device: torch.device) -> bool:
    """A GPU, or a CPU with instructions for it."""
    if device.type == "cuda":
        return True
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _shares(jobs: list[tuple[States, torch.Tensor]], count: int) -> list[list[tuple[States, torch.Tensor]]]:
    """Each worker's part of a step, about the same number of anchors; the same on every machine with as many workers."""
    shares: list[list[tuple[States, torch.Tensor]]] = [[] for _ in range(count)]
    for job in sorted(jobs, key=lambda job: -len(job[1])):
        min(shares, key=lambda share: sum(len(anchors) for _, anchors in share)).append(job)
    return [share for share in shares if share]
