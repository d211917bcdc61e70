"""Hidden states of the target over finished texts, on disk in half precision: written once, bounded, read in random order.

Only hidden states are stored, never logits: the output head runs where they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from engine.batch import NORMALISED, ForwardBatch
from engine.kv_pool import KVPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from engine.batch import TargetModel
    from engine.training.answers import Text

_BLOCK = 16


@dataclass(frozen=True, slots=True)
class States:
    """One text of T tokens. taps: [T, n * hidden], joined in the drafter's order; final: [T, hidden] after the final norm."""

    tokens: torch.Tensor
    prompt_length: int
    taps: torch.Tensor
    final: torch.Tensor


class StateStore:
    """A folder with one file a text. `write` stops at `max_bytes`; what is there already is kept and counted."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob("*.safetensors"))

    def load(self, name: str) -> States:
        tensors = load_file(self._folder / f"{name}.safetensors")
        length = int(tensors["prompt_length"][0])
        return States(tensors["tokens"].long(), length, tensors["taps"].float(), tensors["final"].float())

    def write(self, texts: Iterable[Text], model: TargetModel, taps: tuple[int, ...], tell: Callable[[str], None]) -> bool:
        """One forward a text that is not there yet. Returns False where the bound was reached before the last."""
        present = set(self.names())
        used = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        for count, text in enumerate(texts, 1):
            if text.id in present:
                continue
            if used >= self._max_bytes:
                tell(f"hidden states: {used >> 20} MiB reached the bound of {self._max_bytes >> 20} MiB; training uses what is there")
                return False
            used += self._save(text, *forward_states(model, text.tokens, taps))
            if count % 50 == 0:
                tell(f"hidden states: {count} texts, {used >> 20} MiB")
        return True

    def _save(self, text: Text, taps: torch.Tensor, final: torch.Tensor) -> int:
        path, part = self._folder / f"{text.id}.safetensors", self._folder / f"{text.id}.part"
        tensors = {
            "tokens": torch.tensor(text.tokens, dtype=torch.int32),
            "prompt_length": torch.tensor([text.prompt_length]),
            "taps": taps.half().cpu(),
            "final": final.half().cpu(),
        }
        save_file(tensors, part)
        part.replace(path)
        return path.stat().st_size


@torch.inference_mode()
def forward_states(model: TargetModel, tokens: tuple[int, ...], taps: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(taps [T, n * hidden], final [T, hidden]) of one text, by the target as it runs here."""
    spec, length = model.spec, len(tokens)
    count = -(-length // _BLOCK)
    kv = KVPool(spec.num_layers, count + 1, _BLOCK, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)
    place = np.arange(length)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(spec.device)

    batch = ForwardBatch(
        token_ids=tensor(np.array(tokens, np.int64)),
        positions=tensor(place),
        slots=tensor(place + _BLOCK),
        block_tables=tensor(np.arange(1, count + 1, dtype=np.int32)[None]),
        query_start=tensor(np.array([0, length], np.int32)),
        kv_lengths=tensor(np.array([length], np.int32)),
        logit_rows=tensor(np.array([length - 1], np.int64)),
        max_query=length,
        max_kv=length,
        taps=(*sorted(set(taps)), NORMALISED),
    )
    out = model.forward(batch, kv)
    return torch.cat([out.taps[tap] for tap in taps], dim=-1), out.taps[NORMALISED]
