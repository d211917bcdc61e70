"""DSpark (arXiv 2607.05147) and DFlash (2602.06036): a whole block of drafts from one pass, then a light sequential head over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import kernels
from engine.checkpoints.drafters.check import block_shapes, check_target, check_tensors
from engine.checkpoints.drafters.errors import DrafterError
from engine.checkpoints.drafters.formats import block_spec
from engine.drafters.parts.backlog import Backlog
from engine.drafters.parts.block import BlockBackbone, Carried
from engine.drafters.parts.confidence import CHAINED, ConfidenceBins
from engine.drafters.parts.draws import Draws
from engine.drafters.parts.frozen import large, vocabulary
from engine.drafters.parts.layers import Weights
from engine.drafters.parts.on_device import DeviceBlocks
from engine.drafters.parts.places import recent_slots, slots_of
from engine.drafters.parts.spread import Drafted
from engine.transfer import to_device
from kernels.reference.sequential_head import SequentialHead

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.checkpoints.drafters.folder import DrafterFolder
    from engine.checkpoints.drafters.specs import BlockSpec
    from engine.drafters.base import DraftBatch, Drafts, Host, Progress
    from engine.drafters.parts.frozen import Vocabulary
    from engine.sequence import Sequence

    Ints = NDArray[np.int64]


_LOGIT_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
"""Logits of a pass that are there at a time, by kind of device: those of a large batch would be the largest thing in a step."""


class DSparkDrafter:
    """Drafts blocks of `spec.block_size` slots; longer drafts chain blocks, each anchored at the last draft before it.

    Reads the target's hidden states as they pass by (no second pass), and keeps keys and values for confirmed tokens only. On a CPU it
    works through them when it is to draft: few rows take as long as many, and where it is never chosen, nothing. Output head and sequential
    head run only for the slots that are asked for. Everything stays on the device until the drafts are read back, once.

    prompt_window: of a longer prompt, only so many of its last tokens are taken in. A drafter that was trained on texts of that length
    gains nothing from what lies before, and to take in thousands of tokens costs some percent of their prefill. None: all of it.
    """

    def __init__(
        self,
        name: str,
        spec: BlockSpec,
        weights: Weights,
        host: Host,
        calibration: dict[str, Any],
        prompt_window: int | None = None,
    ) -> None:
        self.name = name
        self.folder: DrafterFolder | None = None
        self.taps = tuple(sorted(set(spec.taps)))
        self._spec = spec
        self._host = host
        self._vocabulary: Vocabulary = vocabulary(weights, host.target.frozen(), scale=spec.embedding_scale, soft_cap=spec.logit_soft_cap)
        self._head = _sequential_head(spec, weights, self._vocabulary.target_ids)
        self._bins = ConfidenceBins(spec.drafts_per_block * CHAINED, calibration, known=spec.confidence or "sharpness" in calibration)
        self.prior = self._bins.prior
        self._backbone = BlockBackbone(
            spec, weights, num_blocks=host.num_blocks, block_size=host.block_size, first_blocks=host.first_blocks
        )
        self._device = weights.device
        self.prompt_window = prompt_window
        self._backlog = Backlog()
        if self._device.type == "cpu":
            self._compile()

    def _compile(self) -> None:
        """Drafts one token, so that what is compiled at first use is compiled now, rather than in a request's time."""
        columns = self._head.columns or self._spec.needs.vocab_size
        hidden = torch.zeros(1, 1, self._spec.layers.hidden_size, dtype=self._host.target.spec.dtype)
        kernels.sequential_head(torch.zeros(1, 1, columns), hidden, torch.zeros(1, dtype=torch.int64), self._head)

    @classmethod
    def load(cls, folder: DrafterFolder, host: Host) -> DSparkDrafter:
        """Raises DrafterError where the folder's tensors, its config and the target do not go together."""
        spec = block_spec(folder.config)
        target = host.target.spec
        check_target(spec.needs, spec.taps, target)
        if spec.mask_token_id >= spec.needs.vocab_size:
            raise DrafterError(f"mask_token_id is {spec.mask_token_id}, outside of its vocabulary of {spec.needs.vocab_size}")
        tensors = folder.tensors()
        check_tensors(tensors, *block_shapes(spec), spec.format)
        weights = Weights(tensors, target.dtype, target.device)
        made = cls(folder.name, spec, weights, host, folder.calibration, folder.record.get("training", {}).get("max_length"))
        made.folder = folder
        return made

    @property
    def spec(self) -> BlockSpec:
        return self._spec

    @property
    def drafts_per_pass(self) -> int:
        return self._spec.drafts_per_block

    def exchange(self, tensors: dict[str, torch.Tensor]) -> None:
        """Drafts with other weights from now on. Raises DrafterError where they are not of this drafter's shapes."""
        check_tensors(tensors, *block_shapes(self._spec), self._spec.format)
        target = self._host.target.spec
        weights = Weights(tensors, target.dtype, target.device)
        self._backbone.exchange(weights)
        self._head = _sequential_head(self._spec, weights, self._vocabulary.target_ids)

    @property
    def nbytes_per_block(self) -> int:
        """Memory that a block of the target's KV cache costs here on top."""
        return self._backbone.nbytes // self._host.num_blocks

    @torch.inference_mode()
    def propose(self, batch: DraftBatch) -> Drafts:
        drafts, _ = self.propose_scored(batch)
        return drafts

    @torch.inference_mode()
    def propose_scored(self, batch: DraftBatch) -> tuple[Drafts, NDArray[np.float64]]:
        """Also the evidence that calibration is fitted on, float64 [S, D, 2]; see `parts.confidence.scaled`."""
        rows = np.flatnonzero(batch.limits > 0)
        if not len(rows):
            return Drafted.nothing(len(batch.sequences)), np.zeros((len(batch.sequences), 0, 2))
        self.catch_up()
        sequences, limits = [batch.sequences[row] for row in rows], batch.limits[rows]
        width = int(limits.max())
        draws = Draws(
            sequences,
            step=batch.step,
            entropy=self._host.entropy,
            width=width,
            vocab=self._spec.needs.vocab_size,
            device=self._device,
        )
        return Drafted(rows, limits, *self._draft(sequences, width, draws)).spread(len(batch.sequences), self._bins, draws)

    @torch.inference_mode()
    def observe(self, progress: Progress) -> None:
        rows = progress.rows()
        if self.prompt_window is not None:
            ends = np.repeat([chunk.sequence.prompt_length for chunk in progress.chunks], progress.valid)
            far = progress.positions[rows] < ends - self.prompt_window
            self._backbone.overwrite(progress.slots[rows[far]])
            rows = rows[~far]
        if not len(rows):
            return
        at = to_device(rows, self._device)
        taps = [progress.taps[tap].index_select(0, at) for tap in self._spec.taps]
        positions, slots = progress.positions[rows], progress.slots[rows]
        self._backlog.add(taps, positions, slots)
        self._backbone.saw(slots)
        if self._device.type != "cpu":  # there it waits for nobody
            self.catch_up()

    @property
    def backlog(self) -> int:
        """See `PutsOff`."""
        return len(self._backlog)

    @torch.inference_mode()
    def catch_up(self) -> None:
        """See `PutsOff`."""
        for taps, positions, slots in self._backlog.take():
            self._backbone.take_in(taps, to_device(positions, self._device), to_device(slots, self._device))

    def miss(self, progress: Progress) -> None:
        """See `Rests`. Their slots may have held what was seen of another text."""
        self._backbone.overwrite(progress.slots[progress.rows()])

    @torch.inference_mode()
    def copy(self, sources: Ints, targets: Ints) -> None:
        """See `Rests`."""
        self._backlog.copy(sources, targets)
        self._backbone.copy(sources, targets)

    def on_device(self, slots: int) -> DeviceBlocks:
        """See `DraftsOnDevice`."""
        self.catch_up()
        return DeviceBlocks(
            self._spec, self._backbone, self._vocabulary, self._head, self._bins, block_size=self._host.block_size, slots=slots,
            device=self._device,
        )  # fmt: skip

    def saw(self, slots: Ints) -> None:
        """See `DraftsOnDevice`."""
        self._backbone.saw(slots)

    def knows_from(self, sequence: Sequence) -> int:
        """See `DraftsOnDevice`."""
        self.catch_up()  # what it knows, it must have taken in
        size = self._host.block_size
        missed = np.flatnonzero(~self._backbone.knows(slots_of(sequence, np.arange(sequence.num_computed), size)))
        return int(missed[-1]) // size + 1 if len(missed) else 0

    def follows(self, sequences: list[Sequence]) -> NDArray[np.bool_]:
        """See `Rests`."""
        return np.asarray(self._backbone.knows(recent_slots(sequences, self._host.block_size)).all(axis=1))

    def finish(self, sequence: Sequence, *, complete: bool) -> None:
        """Nothing to forget: the context lies in the target's blocks."""

    def _draft(self, sequences: list[Sequence], width: int, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens int64 [S, width], and float32 [S, width] confidences and chances of the likeliest tokens."""
        spec = self._spec
        tables, lengths = self._context(sequences)
        starts = np.array([sequence.num_tokens - 1 for sequence in sequences], np.int64)
        anchors = torch.tensor([int(sequence.tokens[-1]) for sequence in sequences], device=self._device)
        carried: Carried | None = None
        tokens: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        peaks: list[torch.Tensor] = []
        drafted = 0
        while drafted < width:
            inputs = torch.full((len(sequences), spec.block_size), spec.mask_token_id, device=self._device)
            inputs[:, 0] = anchors
            embedded = self._vocabulary.embed(inputs.view(-1)).view(*inputs.shape, -1)
            hidden, kept = self._backbone.run(embedded, starts + drafted, tables, lengths, carried)
            count = min(width - drafted, spec.drafts_per_block)
            first = 0 if spec.predicts_next else 1
            made, sure, peak = self._draw(hidden[:, first : first + count], anchors, drafted, draws)
            tokens.append(made)
            scores.append(sure)
            peaks.append(peak)
            drafted += count
            anchors = made[:, -1]
            spare = spec.block_size - spec.drafts_per_block  # a last slot whose place the next block's anchor takes
            carried = [(k[:, :, : k.shape[2] - spare], v[:, :, : v.shape[2] - spare]) for k, v in kept]
        return torch.cat(tokens, 1), torch.cat(scores, 1).float(), torch.cat(peaks, 1).exp()

    def _draw(
        self, slots: torch.Tensor, anchors: torch.Tensor, drafted: int, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens int64, confidences and peaks [S, K] of the hidden states of K slots [S, K, hidden], a few sequences at a time."""
        num, count, _ = slots.shape
        columns = self._head.columns or self._spec.needs.vocab_size
        size = max(_LOGIT_BYTES.get(self._device.type, 1 << 30) // (4 * columns * count), 1)
        blocks = []
        for start in range(0, num, size):
            rows = slice(start, start + size)
            logits = self._vocabulary.head(slots[rows].flatten(0, 1)).unflatten(0, (-1, count))
            blocks.append(draws.draw(logits, slots[rows], anchors[rows], drafted, self._head, rows))
        scores = [torch.full_like(block.lse, 0.5) if block.confidence is None else block.confidence for block in blocks]
        return torch.cat([block.tokens for block in blocks]), torch.cat(scores), torch.cat([block.peak for block in blocks])

    def _context(self, sequences: list[Sequence]) -> tuple[Ints, Ints]:
        """Block tables int64 [S, W] of what is computed and may be attended to, and how many tokens that are, int64 [S]."""
        size = self._host.block_size
        first = np.array([self._first_block(sequence) for sequence in sequences], np.int64)
        lengths = np.array([sequence.num_computed for sequence in sequences], np.int64) - first * size
        width = -(-int(lengths.max()) // size)
        tables = np.zeros((len(sequences), width), np.int64)
        for row, (sequence, start) in enumerate(zip(sequences, first.tolist(), strict=True)):
            blocks = sequence.blocks[start : start + width]
            tables[row, : len(blocks)] = blocks
        return tables, lengths

    def _first_block(self, sequence: Sequence) -> int:
        """Blocks before it were never taken in. Sliding windows count from a text's start, so there it is the first."""
        if self.prompt_window is None or any(window is not None for window in self._spec.windows):
            return 0
        return max(sequence.prompt_length - self.prompt_window, 0) // self._host.block_size


def _sequential_head(spec: BlockSpec, weights: Weights, token_ids: torch.Tensor | None) -> SequentialHead:
    confidence: dict[str, Any] = {}
    if spec.confidence:
        confidence = {
            "confidence_weight": weights.take("confidence_head.proj.weight"),
            "confidence_bias": weights.take("confidence_head.proj.bias"),
        }
    if spec.markov_rank == 0:
        return SequentialHead("none", token_ids=token_ids, **confidence)
    w2 = weights.take("markov_head.markov_w2.weight")
    packed = kernels.pack_linear(w2, int8=True) if large(w2) else None
    mixing = {"vanilla": None, "gated": "markov_head.gate_proj", "rnn": "markov_head.joint_proj"}[spec.markov_type]
    return SequentialHead(
        spec.markov_type,
        weights.take("markov_head.markov_w1.weight"),
        None if packed is not None else w2,
        None if mixing is None else weights.take(f"{mixing}.weight"),
        None if mixing is None else weights.take(f"{mixing}.bias"),
        token_ids=token_ids,
        packed_w2=packed,
        **confidence,
    )
