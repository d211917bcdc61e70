"""One step as the engine sees it: what was put together, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.runner import PackedStep, pack
from engine.speculation.cost_model import Load
from engine.transfer import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.logprobs import Kept
    from engine.row_table import RowTable
    from engine.scheduler import Chunk, Copy, StepPlan
    from engine.speculation.proposal import Proposal
    from engine.speculation.verify import Rows

    Ints = NDArray[np.int64]

_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Work:
    """S chunks, the first `num_decoding` of them decoding; chunk s verifies `drafts[s]`. `counts`: int64 [S], confirmed tokens fed.

    copies: int64 [2, N], slots of KV that is copied before the step, and those it is copied to.
    """

    chunks: list[Chunk]
    num_decoding: int
    counts: Ints
    drafts: list[Ints]
    step: PackedStep
    proposal: Proposal
    preempted: int
    copies: Ints

    @staticmethod
    def of(plan: StepPlan, proposal: Proposal, table_rows: NDArray[np.int32], block_size: int) -> Work:
        chunks = plan.decoding + plan.prefill
        drafts = [proposal.tokens(row) for row in range(len(plan.decoding))] + [_NOTHING] * len(plan.prefill)
        counts = np.array([chunk.count for chunk in chunks], np.int64)
        step = pack(chunks, drafts, table_rows, block_size)
        return Work(chunks, len(plan.decoding), counts, drafts, step, proposal, plan.preempted, _slots(plan.copies, block_size))

    @property
    def load(self) -> Load:
        """What the cost model sees of the step."""
        step = self.step
        return Load(step.num_tokens, len(step.logit_rows), int(step.kv_lengths.sum()), int(step.positions.sum()) + step.num_tokens)

    def rows(self, table: RowTable) -> Rows:
        """What the step's logit rows are to be held against."""
        sampling = [(chunk, draft) for chunk, draft in zip(self.chunks, self.drafts, strict=True) if chunk.samples]
        slots = np.array([chunk.sequence.slot for chunk, _ in sampling], np.int64)
        generated = np.array([chunk.sequence.num_generated for chunk, _ in sampling], np.int64)
        return table.rows(slots, generated, self.step.row_counts[self.step.row_counts > 0], [draft for _, draft in sampling])

    @property
    def slots(self) -> Ints:
        """int64 [S]: the slot of each chunk's sequence, as long as it holds one."""
        return np.array([chunk.sequence.slot for chunk in self.chunks], np.int64)

    def row_probabilities(self, logits: torch.Tensor) -> torch.Tensor | None:
        """[R, vocab] what each row's draft was sampled from (a point mass where its drafter is certain); None if all are certain."""
        if not self.proposal.probabilities:
            return None
        full = torch.zeros_like(logits)
        rows = [np.arange(start, start + len(draft)) for draft, start in zip(self.drafts, self.step.row_starts.tolist(), strict=True)]
        full[to_device(np.concatenate(rows), full.device), to_device(np.concatenate(self.drafts), full.device)] = 1.0
        for members, probabilities in self.proposal.probabilities:
            for place, row in enumerate(members.tolist()):
                start, count = int(self.step.row_starts[row]), len(self.drafts[row])
                full[start : start + count] = probabilities[place, :count]
        return full


def _slots(copies: list[Copy], block_size: int) -> Ints:
    """See `Work.copies`."""
    counts = np.array([copy.count for copy in copies], np.int64)
    blocks = np.array([(copy.source, copy.target) for copy in copies], np.int64).reshape(-1, 2).T
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(blocks * block_size, counts, axis=1) + places


@dataclass(frozen=True, slots=True)
class Outcome:
    """Per chunk: `accepted` drafts int64 [S], the token `following` them int64 [S] (nothing for chunks that do not sample), and
    whether all its logits were `finite` bool [S]. `nanoseconds`: the whole step's device time. `kept`: log-probabilities that are wanted.
    """

    accepted: Ints
    following: Ints
    finite: NDArray[np.bool_]
    taps: dict[int, torch.Tensor]
    nanoseconds: int
    kept: Kept | None = None
