"""What requests ask of the logits before anything is chosen: biases, penalties, a least length, allowed tokens.

On a CPU it stands between the forward and `verify`; `engine.device_rules` has the verifying kernel do the same. It works row by row: row j
of a verification block is changed as if drafts 0..j-1 had been accepted, which is what plain decoding would have done at that place. So
whatever is verified, the target's side of every rule of acceptance is the distribution that plain decoding samples from.

Order: bias, repetition (Keskar et al. 2019, section 4.1, on prompt and answer), frequency and presence (OpenAI's, on the answer), least
length, allowed tokens. The first two stand in transformers' order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.device_rules import RowRules
    from engine.sequence import Sequence
    from engine.types import SamplingParams
    from engine.work import Work

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float32]


_FEW_WORDS = 64
"""Words of a mask up to which its tokens are looked up one by one."""


class Constraint(Protocol):
    """What may come next, by the text so far (a grammar, say). One a sequence."""

    def masks(self, output: Ints, drafts: Ints) -> NDArray[np.int32]:
        """int32 [D + 1, ceil(vocab / 32)], bit t % 32 of word t // 32 set where token t may come next: row j after `output` (all that is
        confirmed, growing from call to call) and `drafts[:j]`. Rows past a draft that may not come are never read.
        """
        ...

    @property
    def too_slow(self) -> bool:
        """Whether it takes so long that the request has to go."""
        ...

    def legal(self, output: Ints, drafts: Ints) -> int:
        """How many leading `drafts` may come after `output`."""
        ...

    def forced(self, output: Ints, limit: int) -> tuple[list[int], list[int]]:
        """Up to `limit` tokens that are as good as certain after `output`, and how certain each is: 0 surest, up to 2."""
        ...


class Edits(NamedTuple):
    """Single logits to change: of row `rows[e]`, token `tokens[e]`; every pair once. int64 and float32 [E]."""

    rows: Ints
    tokens: Ints
    bias: Floats
    repetition: Floats
    subtract: Floats


class SequenceRules:
    """The rules of one sequence, with the counts that its penalties need. Work per step goes with the tokens that changed.

    Tokens that are treated differently from the rest have a column each: those biased, those that end an answer, those seen so far.
    """

    def __init__(self, sampling: SamplingParams, prompt: Ints, end_tokens: tuple[int, ...], constraint: Constraint | None) -> None:
        self._sampling = sampling
        self.constraint = constraint
        self._columns: dict[int, int] = {}
        self._tokens = np.empty(64, np.int64)
        self._bias = np.zeros(64, np.float32)
        self._in_prompt = np.zeros(64, np.bool_)
        self._counts = np.zeros(64, np.int64)
        self._seen = 0
        self._ends = self._place(np.array(end_tokens if sampling.min_tokens else (), np.int64))
        biases = dict(sampling.logit_bias)
        biased = self._place(np.array(list(biases), np.int64))
        self._bias[biased] = np.array(list(biases.values()), np.float32)
        self._counting = sampling.penalises
        if sampling.repetition_penalty != 1.0:
            prompted = self._place(np.unique(prompt))
            self._in_prompt[prompted] = True

    def edits(self, output: Ints, drafts: Ints, first_row: int) -> Edits:
        """The changes of rows `first_row` .. `first_row + len(drafts)`. output: the confirmed answer, longer from call to call."""
        height = len(drafts) + 1
        if self._counting:
            fresh = self._place(output[self._seen :])
            np.add.at(self._counts, fresh, 1)
            self._seen = len(output)
            drafted = self._place(drafts)
        width = len(self._columns)
        counts = np.tile(self._counts[:width], (height, 1))
        if self._counting:
            for row, column in enumerate(drafted.tolist(), start=1):
                counts[row:, column] += 1
        bias = np.tile(self._bias[:width], (height, 1))
        too_short = np.arange(len(output), len(output) + height) < self._sampling.min_tokens
        bias[np.ix_(too_short, self._ends)] = -np.inf
        seen = counts > 0
        repetition = np.where(seen | self._in_prompt[:width], np.float32(self._sampling.repetition_penalty), np.float32(1.0))
        frequency, presence = np.float32(self._sampling.frequency_penalty), np.float32(self._sampling.presence_penalty)
        subtract = frequency * counts.astype(np.float32) + presence * seen.astype(np.float32)
        rows = np.repeat(np.arange(first_row, first_row + height), width)
        return Edits(rows, np.tile(self._tokens[:width], height), bias.ravel(), repetition.ravel(), subtract.ravel())

    def _place(self, tokens: Ints) -> Ints:
        """Columns of `tokens`, new ones where they have none. int64 [N]. May put longer arrays in place of those that hold the columns."""
        columns = self._columns
        found = np.array([columns.setdefault(token, len(columns)) for token in tokens.tolist()], np.int64)
        if len(columns) > len(self._tokens):
            room = 2 * len(columns)
            self._tokens, self._counts = np.resize(self._tokens, room), _grown(self._counts, room)
            self._bias, self._in_prompt = _grown(self._bias, room), _grown(self._in_prompt, room)
        self._tokens[found] = tokens
        return found


class Governed(Protocol):
    """One sequence with rules."""

    @property
    def constraint(self) -> Constraint | None: ...


Rules = TypeVar("Rules", bound=Governed)


class RuleBook(ABC, Generic[Rules]):
    """The rules of all requests in the engine that have any. Costs nothing in a step without them."""

    def __init__(self) -> None:
        self._of: dict[int, Rules] = {}

    @abstractmethod
    def _make(self, sampling: SamplingParams, prompt: Ints, end_tokens: tuple[int, ...], constraint: Constraint | None) -> Rules:
        """The rules of one request."""

    @abstractmethod
    def apply(self, logits: torch.Tensor, work: Work) -> RowRules | None:
        """Sees to it that the step's `logits` [R, vocab] are judged by the rules: changes them in place, or says what is to be done."""

    def enter(self, sequence: Sequence, end_tokens: tuple[int, ...], constraint: Constraint | None = None) -> None:
        """Takes down what a sequence asks for. end_tokens: what ends its answer."""
        sampling = sequence.request.sampling
        if sampling.changes_logits or constraint is not None:
            prompt = sequence.tokens[: sequence.prompt_length]
            self._of[sequence.serial] = self._make(sampling, prompt, end_tokens, constraint)

    @property
    def idle(self) -> bool:
        """Whether no request in the engine has any."""
        return not self._of

    def leave(self, sequence: Sequence) -> None:
        self._of.pop(sequence.serial, None)

    def constraint(self, sequence: Sequence) -> Constraint | None:
        """What holds the sequence to a form; it needs to know every token of the text."""
        rules = self._of.get(sequence.serial)
        return None if rules is None else rules.constraint

    def too_slow(self, sequence: Sequence) -> bool:
        """Whether following what the sequence asks for holds up everybody else."""
        constraint = self.constraint(sequence)
        return constraint is not None and constraint.too_slow

    def constraints(self, sequences: list[Sequence]) -> list[Constraint | None] | None:
        """One a sequence; None where none of them has any."""
        if not self._of:
            return None
        found = [self.constraint(sequence) for sequence in sequences]
        return found if any(constraint is not None for constraint in found) else None


class LogitRules(RuleBook[SequenceRules]):
    """For a CPU: changes logits in place."""

    def _make(self, sampling: SamplingParams, prompt: Ints, end_tokens: tuple[int, ...], constraint: Constraint | None) -> SequenceRules:
        return SequenceRules(sampling, prompt, end_tokens, constraint)

    @torch.inference_mode()
    def apply(self, logits: torch.Tensor, work: Work) -> None:
        """Changes the step's `logits` [R, vocab] in place."""
        if not self._of:
            return
        edits, masks = [], []
        for chunk, drafts, row in zip(work.chunks, work.drafts, work.step.row_starts.tolist(), strict=True):
            rules = self._of.get(chunk.sequence.serial) if chunk.samples else None
            if rules is None:
                continue
            output = chunk.sequence.output
            edits.append(rules.edits(output, drafts, row))
            if rules.constraint is not None:
                masks.append((row, rules.constraint.masks(output, drafts)))
        if edits:
            edit(logits, Edits(*(np.concatenate(parts) for parts in zip(*edits, strict=True))))
        if masks:
            rows = np.concatenate([np.arange(row, row + len(mask)) for row, mask in masks])
            allow(logits, rows, np.concatenate([mask for _, mask in masks]))


def edit(logits: torch.Tensor, edits: Edits) -> None:
    """Applies single changes in place. logits: float32 [R, vocab]."""
    rows, tokens, bias, repetition, subtract = (torch.from_numpy(part) for part in edits)
    values = logits[rows, tokens] + bias
    logits[rows, tokens] = torch.where(values < 0, values * repetition, values / repetition) - subtract


def allow(logits: torch.Tensor, rows: Ints, masks: NDArray[np.int32]) -> None:
    """Sets what the `masks` [N, ceil(vocab / 32)] of `rows` [N] leave out to -inf, in place."""
    # Most rows of a form leave a handful of tokens: 10 us each instead of 120 for unpacking 49,152 bits and going over the row twice.
    few = np.count_nonzero(masks, axis=1) <= _FEW_WORDS
    for row, mask in zip(rows[few].tolist(), masks[few], strict=True):
        _keep_only(logits[row], mask)
    rows, masks = rows[~few], masks[~few]
    if not len(rows):
        return
    octets = torch.from_numpy(np.ascontiguousarray(masks, "<i4").view(np.uint8))
    bits = octets[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
    refused = bits.view(len(rows), -1)[:, : logits.shape[1]] == 0
    at = torch.from_numpy(rows)
    logits[at] = logits[at].masked_fill_(refused, -torch.inf)


def _keep_only(row: torch.Tensor, mask: NDArray[np.int32]) -> None:
    """Sets a row [vocab] to -inf but for the tokens of its mask, in place."""
    words = np.flatnonzero(mask)
    bits = np.unpackbits(np.ascontiguousarray(mask[words], "<i4").view(np.uint8), bitorder="little").reshape(-1, 32)
    tokens = (words[:, None] * 32 + np.arange(32))[bits.astype(np.bool_)]
    kept = torch.from_numpy(tokens[tokens < len(row)])
    values = row[kept]
    row.fill_(-torch.inf)
    row[kept] = values


def _grown(array: NDArray[Any], room: int) -> NDArray[Any]:
    grown = np.zeros(room, array.dtype)
    grown[: len(array)] = array
    return grown
