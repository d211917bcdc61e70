"""What a step decided: on the host at once, or on the device, to be read when the next step is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

import kernels
from engine.device_rules import RowRules
from engine.logprobs import Sent
from engine.speculation.verify import Rows, Verdict, accepted_lengths, verify, verify_greedy
from engine.transfer import Arrival, all_to_device, to_device
from kernels.reference.sampling import DraftWeights, SampleRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.batch import Peaks
    from engine.logprobs import Wanted

    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Decision:
    """Of S chunks: `accepted` drafts int64 [S], the token `following` them int64 [S], whether all logits were `finite` bool [S].

    A chunk without rows has 0, -1 and True. scores: the log-probabilities that were asked for of the judge.
    """

    accepted: Ints
    following: Ints
    finite: NDArray[np.bool_]
    scores: Sent | None = None


class Pending(Protocol):
    """A decision on its way."""

    def read(self) -> Decision:
        """Waits for it. Once only."""
        ...


class Judge(Protocol):
    """Verifies a step."""

    def __call__(
        self,
        logits: torch.Tensor,
        rows: Rows,
        row_counts: Ints,
        slots: Ints,
        attempt: int,
        probabilities: torch.Tensor | None,
        rules: RowRules | None = None,
        wanted: Wanted | None = None,
    ) -> Pending:
        """logits: float32 [R, vocab]. rows: what they are held against. row_counts: int64 [S], summing to R.

        slots: int64 [S], whose they are.
        attempt, probabilities: as `engine.speculation.verify.verify` takes them. rules, wanted: for a judge on the device alone.
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
        self,
        logits: torch.Tensor,
        rows: Rows,
        row_counts: Ints,
        slots: Ints,
        attempt: int,
        probabilities: torch.Tensor | None,
        rules: RowRules | None = None,
        wanted: Wanted | None = None,
    ) -> Known:
        """See `Judge`. The logits have been changed by their rules, and their log-probabilities taken before that."""
        del slots, rules, wanted
        return Known(_decide(verify(logits, rows, attempt, probabilities), row_counts))


def judge_peaks(peaks: Peaks, rows: Rows, row_counts: Ints) -> Known:
    """The decision on a step of greedy rows, where their highest logits are all that is known. rows, row_counts: see `Judge`."""
    return Known(_decide(verify_greedy(peaks, rows), row_counts))


def _decide(verdict: Verdict, row_counts: Ints) -> Decision:
    starts = np.cumsum(row_counts) - row_counts
    accepted = accepted_lengths(verdict.stands, starts, np.maximum(row_counts - 1, 0))
    samples = row_counts > 0
    following = np.full(len(samples), -1, np.int64)
    following[samples] = verdict.tokens[(starts + accepted)[samples]]
    bad = np.concatenate(([0], np.cumsum(~verdict.finite)))
    return Decision(accepted, following, bad[starts + row_counts] == bad[starts])


@dataclass(frozen=True, slots=True)
class _Sent:
    """int64 [3, N] of the chunks that have rows."""

    arrival: Arrival
    samples: NDArray[np.bool_]
    scores: Sent | None

    def read(self) -> Decision:
        size = len(self.samples)
        decision = Decision(np.zeros(size, np.int64), np.full(size, -1, np.int64), np.ones(size, np.bool_), self.scores)
        decision.accepted[self.samples], decision.following[self.samples], finite = self.arrival.read()[0]
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
        self,
        logits: torch.Tensor,
        rows: Rows,
        row_counts: Ints,
        slots: Ints,
        attempt: int,
        probabilities: torch.Tensor | None,
        rules: RowRules | None = None,
        wanted: Wanted | None = None,
    ) -> Pending:
        """See `Judge`."""
        samples = row_counts > 0
        if not samples.any():
            return Known(Decision(np.zeros(len(samples), np.int64), np.full(len(samples), -1, np.int64), ~samples))
        device = logits.device
        starts = np.concatenate(([0], np.cumsum(row_counts[samples]))).astype(np.int32)
        small = (rows.modes.astype(np.int32), rows.top_ks.astype(np.int32), rows.temperatures, rows.top_ps, starts)
        large = (rows.seeds.view(np.int64), rows.positions, rows.drafts, slots[samples], np.array([attempt], np.int64))
        modes, top_ks, temperatures, top_ps, row_start = all_to_device(tuple(part.view(np.int32) for part in small), device)
        seeds, positions, drafts, owners, attempts = all_to_device(large, device)
        held = SampleRows(
            modes, temperatures.view(torch.float32), top_ks, top_ps.view(torch.float32), seeds, positions, drafts
        )  # fmt: skip
        draft = None if probabilities is None else DraftWeights(probabilities.log(), logits.new_zeros(len(logits)))
        rules = rules or RowRules()
        verdict = kernels.verify(logits, held, attempts, draft=draft, biases=rules.biases, penalties=rules.penalties, allowed=rules.allowed)
        scores = None
        if wanted is not None:
            # Up to the first draft that falls, what comes in a row is its draft or what replaces it.
            at = to_device(wanted.rows, device)
            scores = Sent(logits, at, torch.where(verdict.stands, drafts, verdict.tokens)[at], wanted.width)
        arrival = Arrival(((3, len(owners)), torch.int64), device=device)
        # Last what cannot be done twice: nothing after it needs memory, whose lack would have the step run again.
        made = kernels.accept_drafts(verdict, row_start, rules.count(drafts))
        self._latest.index_copy_(0, owners, made[1])
        arrival.send(made)
        return _Sent(arrival, samples, scores)
