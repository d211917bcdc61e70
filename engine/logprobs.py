"""Log-probabilities of tokens, under the model's own distribution: before biases, penalties, temperature and cuts.

Only rows that somebody wants are looked at. Of a verification block, rows count up to the first token that replaced a draft.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.transfer import to_device
from engine.types import TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.sequence import Sequence
    from engine.work import Outcome, Work

    Ints = NDArray[np.int64]


@dataclass(slots=True)
class _Log:
    """What one sequence has so far: of its prompt from the second token on, and of its answer."""

    prompt: list[TokenLogprob] = field(default_factory=list)
    answer: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Kept:
    """Log-probabilities float32 [K, vocab] of the rows wanted, and where each chunk's begin, by its index: prompt rows, answer rows."""

    values: torch.Tensor
    prompt_places: dict[int, int]
    answer_places: dict[int, int]


class Logprobs:
    """The log-probabilities of all requests in the engine that want any. Costs nothing in a step without them."""

    def __init__(self) -> None:
        self._of: dict[int, _Log] = {}

    def enter(self, sequence: Sequence) -> None:
        if sequence.request.sampling.logprobs is not None:
            self._of[sequence.serial] = _Log()

    def wants(self, sequence: Sequence) -> bool:
        return sequence.serial in self._of

    def leave(self, sequence: Sequence) -> tuple[tuple[TokenLogprob, ...], tuple[TokenLogprob, ...]]:
        """Of the prompt and of the answer; forgets both."""
        log = self._of.pop(sequence.serial, None)
        return ((), ()) if log is None else (tuple(log.prompt), tuple(log.answer[: sequence.num_generated]))

    @torch.inference_mode()
    def keep(self, logits: torch.Tensor, work: Work) -> tuple[torch.Tensor, Kept | None]:
        """Takes what is wanted out of a step's `logits`, before anything changes them. Also returns the rows that verification needs."""
        if not self._of:
            return logits, None
        step = work.step
        rows, prompt_places, answer_places, count = [], {}, {}, 0
        answers = np.arange(len(step.logit_rows)) if step.scored is None else np.flatnonzero(~step.scored)
        prompts = np.empty(0, np.int64) if step.scored is None else np.flatnonzero(step.scored)
        taken = 0
        for index, chunk in enumerate(work.chunks):
            if chunk.sequence.serial not in self._of:
                continue
            if chunk.scored:
                prompt_places[index] = count
                rows.append(prompts[taken : taken + chunk.scored])
                taken += chunk.scored
                count += chunk.scored
            if chunk.samples:
                answer_places[index] = count
                start, height = int(step.row_starts[index]), int(step.row_counts[index])
                rows.append(answers[start : start + height])
                count += height
        if not count:
            return logits, None
        values = torch.log_softmax(logits[to_device(np.concatenate(rows), logits.device)], dim=1)
        if step.scored is not None:
            logits = logits[to_device(answers, logits.device)]
        return logits, Kept(values, prompt_places, answer_places)

    def book(self, work: Work, outcome: Outcome) -> None:
        """Notes the tokens of a step. What comes after an answer's end is dropped when it leaves."""
        kept = outcome.kept
        if kept is None:
            return
        rows: list[int] = []
        tokens: list[int] = []
        owners: list[tuple[list[TokenLogprob], int]] = []
        for index, place in kept.prompt_places.items():
            chunk = work.chunks[index]
            if chunk.sequence.serial not in self._of:
                continue  # it has ended since the step was launched
            log = self._of[chunk.sequence.serial].prompt
            known = len(log) - chunk.start  # more than 0 where a preempted prompt is computed again
            new = chunk.sequence.tokens[chunk.start + known + 1 : chunk.start + chunk.scored + 1].tolist()
            rows += range(place + known, place + chunk.scored)
            tokens += new
            owners += [(log, _width(chunk.sequence))] * len(new)
        for index, place in kept.answer_places.items():
            sequence, accepted = work.chunks[index].sequence, int(outcome.accepted[index])
            if sequence.serial not in self._of:
                continue
            new = [*work.drafts[index][:accepted].tolist(), int(outcome.following[index])]
            rows += range(place, place + len(new))
            tokens += new
            owners += [(self._of[sequence.serial].answer, _width(sequence))] * len(new)
        for (log, width), entry in zip(owners, _entries(kept.values, rows, tokens, max((w for _, w in owners), default=0)), strict=True):
            log.append(TokenLogprob(entry.token_id, entry.logprob, entry.top[:width]))


def _width(sequence: Sequence) -> int:
    return sequence.request.sampling.logprobs or 0


def _entries(values: torch.Tensor, rows: list[int], tokens: list[int], width: int) -> list[TokenLogprob]:
    """One entry a pair of row and token, with the `width` likeliest tokens of the row."""
    at = torch.tensor(rows, dtype=torch.int64, device=values.device)
    chosen = values[at, torch.tensor(tokens, dtype=torch.int64, device=values.device)].tolist()
    if not width:
        return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
    best, ids = values[at].topk(min(width, values.shape[1]), dim=1)
    tops = (tuple(zip(row, numbers, strict=True)) for row, numbers in zip(ids.tolist(), best.tolist(), strict=True))
    return [TokenLogprob(token, logprob, top) for token, logprob, top in zip(tokens, chosen, tops, strict=True)]
