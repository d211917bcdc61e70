"""What a drafter is: something that guesses how confirmed text goes on. It never decides what is verified or accepted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from engine.batch import TargetModel
    from engine.drafters.parts.on_device import DeviceBlocks
    from engine.scheduler import Chunk
    from engine.sequence import Sequence
    from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Host:
    """The engine that a drafter works in. directory: the target's checkpoint, None where there is none.

    num_blocks, block_size: of the target's KV pool; a sequence's `blocks` are numbers below num_blocks. entropy: 64 bits for noise.
    first_blocks: those that have memory before the first request comes.
    """

    target: TargetModel
    tokenizer: Tokenizer
    directory: Path | None
    num_blocks: int
    block_size: int
    max_sequences: int
    entropy: int
    first_blocks: int = 0


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Whom to draft for: S decoding sequences, `limits[s]` tokens at most for the s-th (int64 [S], may be 0).

    `step` never repeats in a run: noise keyed by it is fresh on every attempt.
    """

    sequences: list[Sequence]
    limits: NDArray[np.int64]
    step: int


@dataclass(frozen=True, slots=True)
class Drafts:
    """Row s drafts `token_ids[s, :lengths[s]]`, the tokens that may follow the sequence's last confirmed one.

    token_ids: int64 [S, D]. lengths: int64 [S]. bins: int64 [S, D], what the calibration tells apart, -1 past the length; a bin
    may depend on confirmed text and on earlier drafts of its row, never on its own draft.
    probabilities: float32 [S, D, vocab] that random drafts were sampled from; None: every draft is certain given the text.
    """

    token_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    bins: NDArray[np.int64]
    probabilities: torch.Tensor | None = None

    def rows(self, rows: NDArray[np.int64]) -> Drafts:
        """Certain drafts of some rows alone."""
        return Drafts(self.token_ids[rows], self.lengths[rows], self.bins[rows])

    @staticmethod
    def certain(rows: list[tuple[list[int], list[int]]]) -> Drafts:
        """From one (tokens, bins) pair a sequence."""
        lengths = np.array([len(tokens) for tokens, _ in rows], np.int64)
        widest = int(lengths.max(initial=0))
        token_ids = np.zeros((len(rows), widest), np.int64)
        bins = np.full((len(rows), widest), -1, np.int64)
        for row, (tokens, row_bins) in enumerate(rows):
            token_ids[row, : len(tokens)] = tokens
            bins[row, : len(tokens)] = row_bins
        return Drafts(token_ids, lengths, bins)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step confirmed, for drafters that read the target's hidden states.

    Chunk s put rows `query_start[s] : query_start[s] + valid[s]` of each tap (tensor [T, hidden], by hidden-state index) on
    confirmed text, at positions from `chunks[s].start` on; the rows after them belong to rejected drafts.
    positions, slots: int64 [T], where each row stands in its text and where its KV lies (block * block_size + offset).
    """

    chunks: list[Chunk]
    query_start: NDArray[np.int32]
    valid: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    taps: dict[int, torch.Tensor] = field(default_factory=dict)

    def rows(self) -> NDArray[np.int64]:
        """int64 [N], the rows on confirmed text."""
        owner = np.repeat(np.arange(len(self.valid)), self.valid)
        ends = np.cumsum(self.valid)
        return np.arange(len(owner)) - np.repeat(ends - self.valid, self.valid) + self.query_start[owner]


@runtime_checkable
class Remembers(Protocol):
    """A drafter that learns from answers finished elsewhere."""

    def remember(self, template: str | None, tokens: list[int]) -> None:
        """tokens: the last few of a prompt and the answer to it."""
        ...


@runtime_checkable
class Exchangeable(Protocol):
    """A drafter whose weights can be exchanged between two steps."""

    def exchange(self, tensors: dict[str, torch.Tensor]) -> None:
        """By the names of its checkpoint. Raises DrafterError where they do not fit."""
        ...


@runtime_checkable
class Blocks(Protocol):
    """A drafter whose drafts come a block a pass; more are blocks chained, each as dear as the first."""

    @property
    def drafts_per_pass(self) -> int: ...


@runtime_checkable
class Rests(Protocol):
    """A drafter of hidden states that need not see all of them: it drafts from the positions that it saw, as if there were no others."""

    def miss(self, progress: Progress) -> None:
        """These positions are computed now, and it does not get to see them. `progress` has no taps that it could rely on."""
        ...

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """The KV of slots `sources` was copied to `targets`, int64 [N]: it saw of these what it saw of those."""
        ...

    def follows(self, sequences: list[Sequence]) -> NDArray[np.bool_]:
        """bool [S]: whether it saw as much of each sequence's end as it needs to be worth asking."""
        ...


@runtime_checkable
class PutsOff(Protocol):
    """A drafter of hidden states that keeps what it was shown until it is to draft, or told to work through it.

    backlog: tokens that it was shown and has not taken in. prompt_window: of a longer prompt it takes in only so many of the last tokens.
    """

    @property
    def backlog(self) -> int: ...

    @property
    def prompt_window(self) -> int | None: ...

    def catch_up(self) -> None:
        """Takes in what is left, if anything."""
        ...


@runtime_checkable
class DraftsOnDevice(Rests, Blocks, Protocol):
    """A drafter of hidden states that can also draft inside a step, for an `engine.pipeline`, from what it was shown until then."""

    def on_device(self, slots: int) -> DeviceBlocks:
        """A part of it for a pipeline of so many slots, which keeps what it is shown where the drafter itself finds it."""
        ...

    def saw(self, slots: NDArray[np.int64]) -> None:
        """That part took in what lies here."""
        ...

    def knows_from(self, sequence: Sequence) -> int:
        """The first block from which on it saw all of the text whose KV is there."""
        ...


class Listener(Protocol):
    """Sees what drafters see, and drafts nothing."""

    taps: tuple[int, ...]

    def observe(self, progress: Progress) -> None: ...

    def finish(self, sequence: Sequence, *, complete: bool) -> None: ...


class Drafter(Protocol):
    """One drafter serves all sequences that use it. State per sequence is keyed by `Sequence.serial`.

    taps: hidden-state indices of the target that `observe` wants; `observe` is called only where there are any.
    prior: float64 [bins], the chance that a draft in a bin stands, before anything was seen.
    """

    name: str
    taps: tuple[int, ...]
    prior: NDArray[np.float64]

    def propose(self, batch: DraftBatch) -> Drafts:
        """Drafts for all sequences of the batch at once."""
        ...

    def observe(self, progress: Progress) -> None:
        """Takes in the hidden states of newly confirmed tokens."""
        ...

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        """Forgets a sequence; a `complete` one ended by itself, and its text may help its siblings."""
        ...
