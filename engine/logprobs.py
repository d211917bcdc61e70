"""Log-probabilities of tokens, under the model's own distribution: before biases, penalties, temperature and cuts.

Only rows that somebody wants are looked at. Of a verification block, rows count up to the first token that replaced a draft.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

import kernels
from engine.transfer import Arrival, to_device
from engine.types import TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.sequence import Sequence
    from engine.work import Outcome, Work

    Ints = NDArray[np.int64]


_NOTHING = np.empty(0, np.int64)


@dataclass(slots=True)
class _Log:
    """What one sequence has so far: of its prompt from the second token on, and of its answer."""

    prompt: list[TokenLogprob] = field(default_factory=list)
    answer: list[TokenLogprob] = field(default_factory=list)


class Scores(Protocol):
    """Log-probabilities of K rows."""

    def entries(self, rows: list[int], tokens: list[int], width: int) -> list[TokenLogprob]:
        """One entry a pair of row and token, with the `width` likeliest tokens of the row."""
        ...


@dataclass(frozen=True, slots=True)
class Table:
    """All of them, float32 [K, vocab]: for a CPU, where the rows that count can be looked up once they are known."""

    values: torch.Tensor

    def entries(self, rows: list[int], tokens: list[int], width: int) -> list[TokenLogprob]:
        """See `Scores`."""
        at = torch.tensor(rows, dtype=torch.int64)
        chosen = self.values[at, torch.tensor(tokens, dtype=torch.int64)].tolist()
        if not width:
            return [TokenLogprob(token, logprob) for token, logprob in zip(tokens, chosen, strict=True)]
        best, ids = self.values[at].topk(min(width, self.values.shape[1]), dim=1)
        tops = (tuple(zip(row, numbers, strict=True)) for row, numbers in zip(ids.tolist(), best.tolist(), strict=True))
        return [TokenLogprob(token, logprob, top) for token, logprob, top in zip(tokens, chosen, tops, strict=True)]


class Sent:
    """Those of the tokens that came, and of the likeliest ones, worked out on the device and on their way to the host."""

    def __init__(self, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, width: int) -> None:
        """Arguments as `kernels.token_log_probs` takes them."""
        count, width = len(rows), min(width, logits.shape[1])
        shapes = ((count,), torch.float32), ((count, width), torch.int64), ((count, width), torch.float32)
        self._arrival = Arrival(*shapes, device=logits.device)
        self._arrival.send(*kernels.token_log_probs(logits, rows, tokens, width))

    def entries(self, rows: list[int], tokens: list[int], width: int) -> list[TokenLogprob]:
        """See `Scores`; `tokens` are those that the device knew, `width` at most what was asked of it."""
        chosen, ids, best = (part[rows] for part in self._arrival.read())
        tops = (tuple(zip(row[:width], numbers[:width], strict=True)) for row, numbers in zip(ids.tolist(), best.tolist(), strict=True))
        return [TokenLogprob(token, logprob, top) for token, logprob, top in zip(tokens, chosen.tolist(), tops, strict=True)]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows int64 [K] of the logits that are verified whose log-probabilities are wanted, with the `width` likeliest of each."""

    rows: Ints
    width: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What is wanted of a step, and where each chunk's rows begin, by its index. answer: where it is known only with the verdict, None
    until then, and `wanted` says what it is to be.
    """

    prompt: Scores | None
    answer: Scores | None
    prompt_places: dict[int, int]
    answer_places: dict[int, int]
    wanted: Wanted | None


class Logprobs:
    """The log-probabilities of all requests in the engine that want any. Costs nothing in a step without them."""

    def __init__(self, *, late: bool = False) -> None:
        """late: steps are read after the next one was launched, so what is wanted of them is worked out on the device."""
        self._late = late
        self._of: dict[int, _Log] = {}

    def enter(self, sequence: Sequence) -> None:
        if sequence.request.sampling.logprobs is not None:
            self._of[sequence.serial] = _Log()

    @property
    def idle(self) -> bool:
        """Whether no request in the engine wants any."""
        return not self._of

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
        answers = np.arange(len(step.logit_rows)) if step.scored is None else np.flatnonzero(~step.scored)
        prompts = np.empty(0, np.int64) if step.scored is None else np.flatnonzero(step.scored)
        prompt_places, answer_places = dict[int, int](), dict[int, int]()
        taken = width = 0
        successors, rows = [_NOTHING], [_NOTHING]
        for index, chunk in enumerate(work.chunks):
            sequence = chunk.sequence
            if sequence.serial not in self._of:
                continue
            width = max(width, _width(sequence))
            if chunk.scored:
                prompt_places[index] = taken
                taken += chunk.scored
                successors.append(sequence.tokens[chunk.start + 1 : chunk.start + chunk.scored + 1])
            if chunk.samples:
                answer_places[index] = sum(map(len, rows))
                start = int(step.row_starts[index])
                rows.append(np.arange(start, start + int(step.row_counts[index])))
        prompt: Scores | None = None
        answer: Scores | None = None
        wanted: Wanted | None = None
        if taken:
            at = to_device(prompts, logits.device)
            if self._late:
                prompt = Sent(logits, at, to_device(np.concatenate(successors), logits.device), width)
            else:
                prompt = Table(torch.log_softmax(logits[at], dim=1))
        if step.scored is not None:
            logits = logits[to_device(answers, logits.device)]
        if answer_places:
            wanted = Wanted(np.concatenate(rows), width)
            if not self._late:
                answer = Table(torch.log_softmax(logits[torch.from_numpy(wanted.rows)], dim=1))
        return logits, Kept(prompt, answer, prompt_places, answer_places, wanted) if taken or answer_places else None

    def book(self, work: Work, outcome: Outcome) -> None:
        """Notes the tokens of a step. What comes after an answer's end is dropped when it leaves."""
        kept = outcome.kept
        if kept is None:
            return
        found = _Found()
        for index, place in kept.prompt_places.items():
            chunk = work.chunks[index]
            if chunk.sequence.serial not in self._of:
                continue  # it has ended since the step was launched
            log = self._of[chunk.sequence.serial].prompt
            known = len(log) - chunk.start  # more than 0 where a preempted prompt is computed again
            new = chunk.sequence.tokens[chunk.start + known + 1 : chunk.start + chunk.scored + 1].tolist()
            found.add(log, place + known, new, _width(chunk.sequence))
        found.note(kept.prompt)
        found = _Found()
        for index, place in kept.answer_places.items():
            sequence, accepted = work.chunks[index].sequence, int(outcome.accepted[index])
            if sequence.serial in self._of:
                new = [*work.drafts[index][:accepted].tolist(), int(outcome.following[index])]
                found.add(self._of[sequence.serial].answer, place, new, _width(sequence))
        found.note(kept.answer)


@dataclass(slots=True)
class _Found:
    """Rows and the tokens that came there, and whose log they go to."""

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    owners: list[tuple[list[TokenLogprob], int]] = field(default_factory=list)

    def add(self, log: list[TokenLogprob], place: int, tokens: list[int], width: int) -> None:
        self.rows += range(place, place + len(tokens))
        self.tokens += tokens
        self.owners += [(log, width)] * len(tokens)

    def note(self, scores: Scores | None) -> None:
        if not self.rows:
            return
        assert scores is not None
        entries = scores.entries(self.rows, self.tokens, max(width for _, width in self.owners))
        for (log, width), entry in zip(self.owners, entries, strict=True):
            log.append(TokenLogprob(entry.token_id, entry.logprob, entry.top[:width]))


def _width(sequence: Sequence) -> int:
    return sequence.request.sampling.logprobs or 0
