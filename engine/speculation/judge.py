"""What a step decided: on the host at once, or on the device, to be read when the next step is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

import kernels
from engine.speculation.verify import Rows, accepted_lengths, verify
from engine.transfer import to_device
from kernels.reference.sampling import DraftWeights, SampleRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

_ALIGNMENT = 4
"""Numbers of the staged rows that a part begins at a multiple of: 16 bytes, so that kernels are compiled once, whatever the row count."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Of S chunks: `accepted` drafts int64 [S], the token `following` them int64 [S], whether all logits were `finite` bool [S].

    A chunk without rows has 0, -1 and True.
    """

    accepted: Ints
    following: Ints
    finite: NDArray[np.bool_]


class Pending(Protocol):
    """A decision on its way."""

    def read(self) -> Decision:
        """Waits for it. Once only."""
        ...


class Judge(Protocol):
    """Verifies a step."""

    def __call__(
        self, logits: torch.Tensor, rows: Rows, row_counts: Ints, slots: Ints, attempt: int, probabilities: torch.Tensor | None
    ) -> Pending:
        """logits: float32 [R, vocab]. rows: what they are held against. row_counts: int64 [S], summing to R.

        slots: int64 [S], whose they are.
        attempt, probabilities: as `engine.speculation.verify.verify` takes them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Known:
    """A decision that is there already."""

    decision: Decision

    def read(self) -> Decision:
        return self.decision


class HostJudge:
    """`engine.speculation.verify`: for a CPU, and where the host waits for each step anyway."""

    def __call__(
        self, logits: torch.Tensor, rows: Rows, row_counts: Ints, slots: Ints, attempt: int, probabilities: torch.Tensor | None
    ) -> Known:
        del slots
        verdict = verify(logits, rows, attempt, probabilities)
        starts = np.cumsum(row_counts) - row_counts
        accepted = accepted_lengths(verdict.stands, starts, np.maximum(row_counts - 1, 0))
        samples = row_counts > 0
        following = np.full(len(samples), -1, np.int64)
        following[samples] = verdict.tokens[(starts + accepted)[samples]]
        bad = np.concatenate(([0], np.cumsum(~verdict.finite)))
        return Known(Decision(accepted, following, bad[starts + row_counts] == bad[starts]))


@dataclass(frozen=True, slots=True)
class _Sent:
    """int64 [3, N] of the chunks that have rows, once `event` has come to pass; None on a CPU, where it has."""

    values: torch.Tensor
    samples: NDArray[np.bool_]
    event: torch.cuda.Event | None

    def read(self) -> Decision:
        if self.event is not None:
            self.event.synchronize()
        size = len(self.samples)
        decision = Decision(np.zeros(size, np.int64), np.full(size, -1, np.int64), np.ones(size, np.bool_))
        decision.accepted[self.samples], decision.following[self.samples], finite = self.values.numpy()
        decision.finite[self.samples] = finite.astype(np.bool_)
        return decision


class DeviceJudge:
    """`kernels.verify` and `kernels.accept_drafts`: nothing is asked of the device before the decision is read.

    The token that follows also goes to `latest[slot]`, where the next step finds it without the host.
    """

    def __init__(self, latest: torch.Tensor) -> None:
        """latest: int64 [slots]."""
        self._latest = latest

    def warm_up(self, vocab: int) -> None:
        """Judges one row, with a draft from a distribution and without, so that the kernels are compiled before the first request."""
        one = np.ones(1, np.int64)
        rows = Rows(np.ones(1, np.int8), np.ones(1, np.float32), one, np.full(1, 0.5, np.float32), one.astype(np.uint64), one, -one)
        logits = torch.zeros(1, vocab, device=self._latest.device)
        for probabilities in (None, logits + 1.0 / vocab):
            self(logits, rows, one, 0 * one, 0, probabilities).read()

    @torch.inference_mode()
    def __call__(
        self, logits: torch.Tensor, rows: Rows, row_counts: Ints, slots: Ints, attempt: int, probabilities: torch.Tensor | None
    ) -> Pending:
        samples = row_counts > 0
        if not samples.any():
            return Known(Decision(np.zeros(len(samples), np.int64), np.full(len(samples), -1, np.int64), ~samples))
        device = logits.device
        starts = np.concatenate(([0], np.cumsum(row_counts[samples]))).astype(np.int32)
        small = (rows.modes.astype(np.int32), rows.top_ks.astype(np.int32), rows.temperatures, rows.top_ps, starts)
        large = (rows.seeds.view(np.int64), rows.positions, rows.drafts, slots[samples], np.array([attempt], np.int64))
        modes, top_ks, temperatures, top_ps, row_start = _staged(tuple(part.view(np.int32) for part in small), device)
        seeds, positions, drafts, owners, attempts = _staged(large, device)
        held = SampleRows(
            modes, temperatures.view(torch.float32), top_ks, top_ps.view(torch.float32), seeds, positions, drafts
        )  # fmt: skip
        draft = None if probabilities is None else DraftWeights(probabilities.log(), logits.new_zeros(len(logits)))
        verdict = kernels.verify(logits, held, attempts, draft=draft)
        accepted, following, finite = kernels.accept_drafts(verdict, row_start)
        self._latest.index_copy_(0, owners, following)
        made = torch.stack((accepted, following, finite.long()))
        if device.type == "cpu":
            return _Sent(made, samples, None)
        values = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)
        values.copy_(made, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return _Sent(values, samples, event)


def _staged(parts: tuple[NDArray[np.generic], ...], device: torch.device) -> list[torch.Tensor]:
    """All parts (of one type) in one copy."""
    sizes = [-(-len(part) // _ALIGNMENT) * _ALIGNMENT for part in parts]
    whole = np.zeros(sum(sizes), parts[0].dtype)
    begin = 0
    for part, size in zip(parts, sizes, strict=True):
        whole[begin : begin + len(part)] = part
        begin += size
    return [tensor[: len(part)] for tensor, part in zip(to_device(whole, device).split(sizes), parts, strict=True)]
