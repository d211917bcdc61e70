"""Hidden states of the target over finished texts, in half precision: on disk, written once, bounded and read in random order; or, where
the target is quicker than a disk, made anew for every step.

Only hidden states are kept, never logits: the output head runs where they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.batch import NORMALISED, ForwardBatch
from engine.kv_pool import KVPool
from engine.training.report import SILENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from engine.batch import TargetModel
    from engine.training.answers import Text
    from engine.training.report import Report

_BLOCK = 16
_DEVICE_TOKENS = 8192
"""Tokens a forward on an accelerator, which a single text does not fill; two cores are full with one."""


@dataclass(frozen=True, slots=True)
class States:
    """One text of T tokens. taps: [T, n * hidden], joined in the drafter's order; final: [T, hidden] after the final norm; both half."""

    tokens: torch.Tensor
    prompt_length: int
    taps: torch.Tensor
    final: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> States:
        """Moved as they are stored, then cast."""
        taps, final = (tensor.to(device).to(dtype) for tensor in (self.taps, self.final))
        return States(self.tokens.to(device), self.prompt_length, taps, final)


class StateStore:
    """A folder with one file a text. `write` stops at `max_bytes`; what is there already is kept and counted."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.safetensors"))

    def load_all(self, names: Sequence[str]) -> list[States]:
        return [self.load(name) for name in names]

    def tokens(self, name: str) -> torch.Tensor:
        with safe_open(self._folder / f"{name}.safetensors", "pt") as file:
            return cast("torch.Tensor", file.get_tensor("tokens")).long()

    def load(self, name: str) -> States:
        tensors = load_file(self._folder / f"{name}.safetensors")
        return States(tensors["tokens"].long(), int(tensors["prompt_length"][0]), tensors["taps"], tensors["final"])

    def write(self, texts: Iterable[Text], model: TargetModel, taps: tuple[int, ...], report: Report = SILENT) -> bool:
        """Runs the target over the texts that are not there yet. Returns False where the bound was reached before the last."""
        present = set(self.names())
        used = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        together = 1 if model.spec.device.type == "cpu" else _DEVICE_TOKENS
        missing = [text for text in texts if text.id not in present]
        count = 0
        for group in _groups(missing, together):
            if used >= self._max_bytes:
                report.tell(f"hidden states: {used >> 20} MiB, the bound is {self._max_bytes >> 20}; training uses what is there")
                return False
            for text, (of_taps, final) in zip(group, forward_states(model, [text.tokens for text in group], taps), strict=True):
                used += self._save(text, of_taps.cpu(), final.cpu())
            count += len(group)
            report.tick("hidden states", count, len(missing))
        return True

    def _save(self, text: Text, taps: torch.Tensor, final: torch.Tensor) -> int:
        path, part = self._folder / f"{text.id}.safetensors", self._folder / f"{text.id}.part"
        tensors = {
            "tokens": torch.tensor(text.tokens, dtype=torch.int32),
            "prompt_length": torch.tensor([text.prompt_length]),
            "taps": taps.contiguous(),
            "final": final.contiguous(),
        }
        save_file(tensors, part)
        part.replace(path)
        return path.stat().st_size


class LiveStates:
    """Texts whose states the target makes whenever they are asked for, on its own device."""

    def __init__(self, texts: Iterable[Text], model: TargetModel, taps: tuple[int, ...], max_length: int) -> None:
        """max_length: a longer text is cut off there."""
        self._texts = {text.id: (text.tokens[:max_length], text.prompt_length) for text in texts}
        self._model, self._taps = model, taps

    def names(self) -> list[str]:
        return sorted(self._texts)

    def tokens(self, name: str) -> torch.Tensor:
        return torch.tensor(self._texts[name][0])

    def load_all(self, names: Sequence[str]) -> list[States]:
        texts = [self._texts[name] for name in names]
        made = forward_states(self._model, [tokens for tokens, _ in texts], self._taps)
        return [
            States(torch.tensor(tokens), prompt_length, taps, final)
            for (tokens, prompt_length), (taps, final) in zip(texts, made, strict=True)
        ]


def _groups(texts: Iterable[Text], tokens: int) -> Iterator[list[Text]]:
    """Texts in order, each group of at least one and otherwise of `tokens` tokens at most."""
    group: list[Text] = []
    used = 0
    for text in texts:
        if group and used + len(text.tokens) > tokens:
            yield group
            group, used = [], 0
        group.append(text)
        used += len(text.tokens)
    if group:
        yield group


@torch.inference_mode()
def forward_states(model: TargetModel, texts: Sequence[tuple[int, ...]], taps: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(taps [T, n * hidden], final [T, hidden]) of each text in half precision, by the target as it runs here and where it runs."""
    spec = model.spec
    lengths = [len(text) for text in texts]
    counts = [-(-length // _BLOCK) for length in lengths]
    kv = KVPool(spec.num_layers, sum(counts) + 1, _BLOCK, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)
    tables = np.zeros((len(texts), max(counts)), np.int32)
    positions, slots, first = [], [], 1
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count] = np.arange(first, first + count)
        positions.append(np.arange(length))
        slots.append(np.arange(length) + first * _BLOCK)
        first += count
    ends = np.cumsum(lengths)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(spec.device)

    batch = ForwardBatch(
        token_ids=tensor(np.concatenate([np.array(text, np.int64) for text in texts])),
        positions=tensor(np.concatenate(positions)),
        slots=tensor(np.concatenate(slots)),
        block_tables=tensor(tables),
        query_start=tensor(np.concatenate(([0], ends)).astype(np.int32)),
        kv_lengths=tensor(np.array(lengths, np.int32)),
        logit_rows=tensor(np.array([ends[-1] - 1], np.int64)),
        max_query=max(lengths),
        max_kv=max(lengths),
        taps=(*sorted(set(taps)), NORMALISED),
    )
    out = model.forward(batch, kv)
    joined = torch.cat([out.taps[tap] for tap in taps], dim=-1).half()
    final = out.taps[NORMALISED].half()
    return [(joined[end - length : end], final[end - length : end]) for length, end in zip(lengths, ends.tolist(), strict=True)]
