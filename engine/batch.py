"""The packed row: every token of a step, of all sequences, in one flat forward (prefill chunks, decode and draft tokens alike)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

import kernels
from kernels import pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.kv_pool import KVPool


_AT_ONCE = 32
"""Inputs of the head that are read back at a time: as many logits a token of the vocabulary."""
NORMALISED = -1
"""Tap index of the hidden states after the final norm, as the output head sees them."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input. T tokens of S sequences, sequence s owning rows `query_start[s]:query_start[s + 1]`.

    token_ids, positions, slots: int64 [T]; `slots` is where each token's key and value go (block * block_size + offset).
    block_tables: int32 [S, widest]; row s lists the KV blocks of sequence s, padded with 0.
    query_start: int32 [S + 1]. kv_lengths: int32 [S], the context after this step's tokens were written.
    logit_rows: int64 [R], the rows whose next-token logits are wanted, ascending.
    max_query, max_kv: Python ints, so that nobody has to ask the device.
    shared_prefix_blocks: leading blocks that are the same for *all* S sequences (0 = none); a kernel may read them once.
    taps: hidden-state indices wanted beside the output (0 = embeddings, i = after layer i, or `NORMALISED`), for drafters.
    peaks: of the logits only the highest of each row and its token are wanted. A model that cannot do with less gives all logits still.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    kv_lengths: torch.Tensor
    logit_rows: torch.Tensor
    max_query: int
    max_kv: int
    shared_prefix_blocks: int = 0
    taps: tuple[int, ...] = ()
    peaks: bool = False


@dataclass(frozen=True, slots=True)
class Peaks:
    """The highest logit of each of R rows, float32 [R] (NaN or infinite where the model gave no number), and its token, int64 [R]."""

    values: torch.Tensor
    tokens: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor) -> Peaks:
        """Of logits [R, vocab]; of equal ones the first."""
        return Peaks(*kernels.peaks(logits))


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """logits: float32 [R, vocab] of the rows asked for; [0, vocab] where there are `peaks`, which say all that was asked for. taps: one
    [T, hidden] tensor an index asked for.
    """

    logits: torch.Tensor
    taps: dict[int, torch.Tensor] = field(default_factory=dict)
    peaks: Peaks | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the rest of the engine must know of a loaded target model."""

    name: str
    revision: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    parameter_bytes: int
    int8_weights: bool = False

    @property
    def precision(self) -> str:
        """The number format of arithmetic, and of weights where that is another."""
        return str(self.dtype).removeprefix("torch.") + ("+int8-weights" if self.int8_weights else "")


@dataclass(frozen=True, slots=True)
class FrozenParts:
    """What drafters share with their target. embedding: [vocab, hidden], unscaled.

    norm: the final norm, [T, hidden] -> [T, hidden]. head: the output head alone, normalised [T, hidden] -> float32 [T, vocab]. tied: its
    rows are the embedding's. rough_head: about the same in less time, where there is such a way.
    """

    embedding: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor], torch.Tensor]
    tied: bool = False
    rough_head: Callable[[torch.Tensor], torch.Tensor] | None = None

    def head_weight(self) -> torch.Tensor:
        """The head's rows, [vocab, hidden], not to be written to. Unless it is tied they are read back through it: a packed product keeps
        them in a layout of its own.
        """
        if self.tied:
            return self.embedding
        kind, device = self.embedding.dtype, self.embedding.device
        one = torch.eye(self.embedding.shape[1], dtype=kind, device=device)
        first = self.head(one[:1])
        shape = (first.shape[1], len(one))
        # As pages of its own, which go back to the system with it: the allocator of a CPU keeps what it is given back.
        weight = pages.zeros(shape, first.dtype) if device.type == "cpu" else first.new_empty(shape)
        for columns, unit in zip(weight.split(_AT_ONCE, dim=1), one.split(_AT_ONCE), strict=True):
            columns.copy_(self.head(unit).T)
        return weight


class TargetModel(Protocol):
    """A decoder that runs packed rows over a paged KV cache (the lean decoder, or any transformers model through the fallback)."""

    spec: ModelSpec

    def forward(self, batch: ForwardBatch, kv: KVPool) -> ForwardOutput:
        """Writes the keys and values of all T tokens into `kv` and returns the logits of `batch.logit_rows`, or their peaks alone.

        A layer writes all of them before it reads any: a sequence's table may list blocks that another sequence of the same
        step fills (siblings that start together share their prefix in one step).
        """
        ...

    def frozen(self) -> FrozenParts:
        """Embedding, final norm and output head, for drafters."""
        ...
