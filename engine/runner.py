"""Builds the packed row of a step and runs the target model on it. Numpy over sequences, one copy to the device, no loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch import ForwardBatch, ForwardOutput, TargetModel
from engine.transfer import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.kv_pool import KVPool
    from engine.scheduler import Chunk


_UNKNOWN = np.zeros(1, np.int64)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One step on the host. S chunks in order; chunk s has `counts[s]` confirmed tokens and `drafts[s]` drafted ones after them.

    A chunk that reaches its sequence's end has `drafts[s] + 1` logit rows, from `row_starts[s]` on; others have none (row_counts 0).
    `logit_rows` also holds rows whose successor is in the prompt, where their log-probabilities are wanted: `scored` marks them (None:
    there are none), and `row_starts` counts without them. `sources`: int64 [T], the slot whose latest token a row's is, where
    the device alone knows it, else -1; None: `token_ids` has all.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    tables: NDArray[np.int32]
    query_start: NDArray[np.int32]
    kv_lengths: NDArray[np.int32]
    logit_rows: NDArray[np.int64]
    row_starts: NDArray[np.int64]
    row_counts: NDArray[np.int64]
    shared_prefix_blocks: int
    scored: NDArray[np.bool_] | None = None
    sources: NDArray[np.int64] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def pack(chunks: list[Chunk], draft_tokens: list[NDArray[np.int64]], table_rows: NDArray[np.int32], block_size: int) -> PackedStep:
    """Lays the chunks out one after the other. draft_tokens: one array a chunk, empty for none. table_rows: the block tables by slot."""
    sequences = [chunk.sequence for chunk in chunks]
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    counts = np.array([chunk.count for chunk in chunks], np.int64)
    drafted = np.array([len(tokens) for tokens in draft_tokens], np.int64)
    known = np.array([sequence.num_tokens for sequence in sequences], np.int64)
    owners = np.array([sequence.slot for sequence in sequences], np.int64)
    promised = np.array([sequence.promised for sequence in sequences], np.int64)
    lengths = counts + drafted
    ends = np.cumsum(lengths)
    pieces: list[NDArray[np.int64]] = []
    # A token that only the device knows is one of a chunk of its own: nothing is to be looked up for it.
    for chunk, tokens, unknown in zip(chunks, draft_tokens, ((promised > 0) & (counts == 1)).tolist(), strict=True):
        pieces.append(_UNKNOWN if unknown else chunk.sequence.tokens[chunk.start : chunk.start + chunk.count])
        if len(tokens):
            pieces.append(tokens)
    owner = np.repeat(np.arange(len(chunks)), lengths)
    positions = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
    kv_lengths = starts + lengths
    width = int(-(-kv_lengths.max() // block_size))
    tables = table_rows[owners, :width]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    rows = np.where(starts + counts == known, drafted + 1, 0)
    row_ends = np.cumsum(rows)
    logit_rows = np.arange(row_ends[-1]) + np.repeat(ends - row_ends, rows)
    logit_rows, scored = _with_scored(chunks, ends - lengths, logit_rows)
    query_start = np.zeros(len(chunks) + 1, np.int32)
    query_start[1:] = ends
    return PackedStep(
        token_ids=np.concatenate(pieces),
        positions=positions,
        slots=slots,
        tables=tables,
        query_start=query_start,
        kv_lengths=kv_lengths.astype(np.int32),
        logit_rows=logit_rows,
        row_starts=row_ends - rows,
        row_counts=rows,
        shared_prefix_blocks=_shared_blocks(tables, int(starts.min()) // block_size),
        scored=scored,
        sources=_sources(np.flatnonzero(promised), owners, ends),
    )


def _sources(promised: NDArray[np.int64], owners: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """See `PackedStep`; a chunk of a sequence with a promised token ends with it. promised: the chunks of such sequences."""
    if not len(promised):
        return None
    sources = np.full(ends[-1], -1, np.int64)
    sources[ends[promised] - 1] = owners[promised]
    return sources


def _with_scored(
    chunks: list[Chunk], firsts: NDArray[np.int64], logit_rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """`logit_rows` with the rows of scored prompt tokens among them, ascending, and which those are."""
    if not any(chunk.sequence.request.sampling.prompt_logprobs for chunk in chunks):
        return logit_rows, None
    counts = np.array([chunk.scored for chunk in chunks], np.int64)
    if not counts.any():
        return logit_rows, None
    wanted = np.concatenate([np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)])
    rows = np.concatenate((wanted, logit_rows))
    order = np.argsort(rows)
    return rows[order], order < len(wanted)


def _shared_blocks(tables: NDArray[np.int32], complete: int) -> int:
    """Leading table columns that are equal in all rows, among the first `complete` ones (wholly computed before this step)."""
    if len(tables) < 2 or complete == 0:
        return 0
    same = (tables[:, :complete] == tables[0, :complete]).all(axis=0)
    return complete if same.all() else int(same.argmin())


class Runner:
    """The target model with its KV cache.

    `latest`: int64 [slots], the token that each slot's sequence sampled last, for steps that are launched before the host knows it; None
    where the host waits for every step.
    """

    def __init__(self, model: TargetModel, kv: KVPool, slots: int | None = None) -> None:
        """slots: of `latest`."""
        self.model = model
        self.kv = kv
        self.latest = None if slots is None else torch.zeros(slots, dtype=torch.int64, device=model.spec.device)

    @torch.inference_mode()
    def run(self, step: PackedStep, taps: tuple[int, ...] = (), *, peaks: bool = False) -> ForwardOutput:
        """One forward; KV of every token of the step is written. Logits: float32 [rows, vocab] on the model's device. taps, peaks: see
        `ForwardBatch`.
        """
        device = self.model.spec.device
        token_ids = to_device(step.token_ids, device)
        if step.sources is not None:
            token_ids = self.resolve(token_ids, to_device(step.sources, device))
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=to_device(step.positions, device),
            slots=to_device(step.slots, device),
            block_tables=to_device(step.tables, device),
            query_start=to_device(step.query_start, device),
            kv_lengths=to_device(step.kv_lengths, device),
            logit_rows=to_device(step.logit_rows, device),
            max_query=int(np.diff(step.query_start).max()),
            max_kv=int(step.kv_lengths.max()),
            shared_prefix_blocks=step.shared_prefix_blocks,
            taps=taps,
            peaks=peaks,
        )
        return self.model.forward(batch, self.kv)

    @torch.inference_mode()
    def copy(self, slots: NDArray[np.int64]) -> None:
        """Copies the KV of slots [0] to slots [1], int64 [2, N], before what is run next."""
        sources, targets = to_device(slots, self.model.spec.device)
        self.kv.copy(sources, targets)

    def resolve(self, token_ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """int64 [T] with the tokens that only the device knows; see `PackedStep`."""
        assert self.latest is not None
        return torch.where(sources >= 0, self.latest[sources.clamp(min=0)], token_ids)

    def spare(self, tokens: int, sequences: int) -> int:  # noqa: ARG002 - a step in its own shape has none
        """Rows that a step of this size would compute beyond its own."""
        return 0


def make_runner(model: TargetModel, kv: KVPool, max_sequences: int) -> Runner:
    """The runner for the model's device: on a GPU one that needs no host between steps, in captured graphs for models that bear it."""
    if model.spec.device.type == "cuda":
        from engine.graphs import GraphRunner
        from engine.models.decoder import LeanDecoder

        if isinstance(model, LeanDecoder):  # transformers' modules may ask the device for numbers, which no capture allows
            return GraphRunner(model, kv, max_sequences)
        return Runner(model, kv, max_sequences)
    return Runner(model, kv)
