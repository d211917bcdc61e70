"""Which embedding and output head a drafter uses: the target's own where its checkpoint holds copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import kernels
from engine.checkpoints.drafters.errors import DrafterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import FrozenParts
    from engine.drafters.parts.layers import Weights

_SAMPLE = 256
_ALIKE = 0.5
"""Mean cosine of stored and actual embeddings: a fine-tuned target stays above 0.99, another model is at 0."""

_LARGE = 8 << 20
"""Bytes of weights beyond which a CPU reads them from memory at every use."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """embed: int64 [T] -> [T, hidden]. head: [T, hidden] -> float32 [T, draft vocab]. target_ids: int64 [draft vocab] or None."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    target_ids: torch.Tensor | None


def vocabulary(weights: Weights, frozen: FrozenParts, *, scale: float = 1.0, soft_cap: float | None = None) -> Vocabulary:
    """Raises DrafterError where the stored embedding is another model's."""
    embedding = frozen.embedding
    if "embed_tokens.weight" in weights:
        stored = weights.take("embed_tokens.weight")
        if stored.shape == embedding.shape:
            _check_origin(stored, embedding)
        embedding = embedding if _same(stored, embedding) else stored
    elif embedding.shape[1] != (width := weights.take("norm.weight").shape[0]):
        raise DrafterError(f"it has no embed_tokens.weight, and the target's embedding is {embedding.shape[1]} wide where it needs {width}")
    own = weights.take("lm_head.weight") if "lm_head.weight" in weights else None
    # What drafts are drawn from need not be the head to the last bit: verification is told what it was. A quarter of the bytes is read.
    rough = None
    if own is None and large(frozen.embedding):
        rough = frozen.rough_head
        own = frozen.head_weight() if rough is None else None
    packed = None if own is None else kernels.pack_linear(own, int8=large(own))

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return (rough or frozen.head)(hidden) if packed is None else kernels.linear(hidden, packed).float()

    if packed is not None or rough is not None:
        width = (frozen.embedding if own is None else own).shape[1]
        head(frozen.embedding.new_zeros(1, width))  # compiles now what is compiled at first use, rather than in a request's time

    def capped(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap

    factor = torch.tensor(scale, dtype=embedding.dtype, device=embedding.device)  # rounded to the model's type first

    def embed(tokens: torch.Tensor) -> torch.Tensor:
        rows = embedding.index_select(0, tokens)
        return rows if scale == 1.0 else rows * factor

    target_ids = None
    if "d2t" in weights:
        offsets = weights.integers("d2t")
        target_ids = torch.arange(len(offsets), device=offsets.device) + offsets
        if int(target_ids.min()) < 0 or int(target_ids.max()) >= len(embedding):
            raise DrafterError(
                f"d2t leads to token {int(target_ids.max())}, outside of the target's {len(embedding)}; d2t holds id - draft id"
            )
    return Vocabulary(embed, capped, target_ids)


def large(matrix: torch.Tensor) -> bool:
    """Whether drafters keep a matrix over the vocabulary in eight bits."""
    return read_from_memory(matrix.nbytes, matrix.dtype, matrix.device)


def read_from_memory(nbytes: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether float32 weights on a CPU come from memory whenever they are used: drafters then keep theirs in eight bits."""
    return device.type == "cpu" and dtype == torch.float32 and nbytes > _LARGE


def _check_origin(stored: torch.Tensor, embedding: torch.Tensor) -> None:
    rows = torch.linspace(0, len(stored) - 1, min(_SAMPLE, len(stored)), device=stored.device).long()
    alike = torch.cosine_similarity(stored[rows].float(), embedding[rows].float(), dim=1).mean()
    if not float(alike) >= _ALIKE:
        raise DrafterError(
            f"its stored token embeddings are not this model's (mean cosine {float(alike):.2f}): it was trained for another model of "
            "the same size; choose a drafter made for this one"
        )


def _same(stored: torch.Tensor, embedding: torch.Tensor) -> bool:
    return stored.shape == embedding.shape and bool(torch.allclose(stored, embedding, rtol=1e-2, atol=1e-3))
