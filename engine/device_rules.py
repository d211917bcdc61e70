"""The rules of `engine.logit_rules` for the verifying kernel: what it must know of a step's rows, and tables that stay on the device.

How often a token was generated is counted by the kernel that accepts drafts, so penalties need no token on the host: a step with them
can be launched before the one before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.logit_rules import RuleBook
from engine.transfer import all_to_device, to_device
from kernels.reference.sampling import Allowed, Biases, Penalties, Tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.logit_rules import Constraint
    from engine.sequence import Sequence
    from engine.types import SamplingParams
    from engine.work import Work

    Ints = NDArray[np.int64]

_FIRST_LINES = 4


@dataclass(frozen=True, slots=True)
class RowRules:
    """As `kernels.verify` and `kernels.accept_drafts` take them; None: the step has none of these."""

    biases: Biases | None = None
    penalties: Penalties | None = None
    allowed: Allowed | None = None
    tally: tuple[torch.Tensor, torch.Tensor] | None = None
    """(counts, lines) of a `Tally` of the sequences that have rows, in their order."""

    def count(self, drafts: torch.Tensor) -> Tally | None:
        return None if self.tally is None else Tally(*self.tally, drafts)


class _Lines:
    """Lines of tables of some widths, taken and given back; there are as many as were ever needed at once, up to a power of two."""

    def __init__(self, device: torch.device, *columns: tuple[int, torch.dtype]) -> None:
        self.tables = [torch.zeros(0, width, dtype=dtype, device=device) for width, dtype in columns]
        self._free: list[int] = []

    def take(self, *contents: NDArray[np.generic] | None) -> int:
        """A line with these contents, one a table; None: zeros."""
        if not self._free:
            size = len(self.tables[0])
            more = max(size, _FIRST_LINES)
            self.tables = [torch.cat((table, table.new_zeros(more, table.shape[1]))) for table in self.tables]
            self._free = list(range(size + more - 1, size - 1, -1))
        line = self._free.pop()
        for table, content in zip(self.tables, contents, strict=True):
            if content is None:
                table[line].zero_()
            else:
                table[line].copy_(to_device(content, table.device))
        return line

    def give(self, line: int) -> None:
        """Work that was launched with it before comes before whatever is written to it next."""
        self._free.append(line)


@dataclass(slots=True)
class _BiasSet:
    """Biases, and end tokens that must not come; its line once there is one, and how many sequences use it."""

    biases: tuple[tuple[int, float], ...]
    ends: tuple[int, ...]
    users: int = 0
    line: int = -1

    def values(self, vocab: int) -> NDArray[np.float32]:
        row = np.zeros(vocab, np.float32)
        for token, bias in self.biases:
            row[token] = bias
        row[list(self.ends)] = -np.inf
        return row


@dataclass(slots=True)
class _Governed:
    """early, late: biases as long as the answer must not end yet, and after that; None: there are none. line: of counts, -1: none yet."""

    sampling: SamplingParams
    prompt: Ints
    constraint: Constraint | None
    early: _BiasSet | None
    late: _BiasSet | None
    line: int = -1


class DeviceRules(RuleBook[_Governed]):
    """Tables have a line for each sequence with penalties, and one for each set of biases in use, however many share it."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        super().__init__()
        self._vocab, self._words, self._device = vocab, -(-vocab // 32), device
        self._counts = _Lines(device, (vocab, torch.int32), (self._words, torch.int32))
        self._biases = _Lines(device, (vocab, torch.float32))
        self._sets: dict[tuple[object, object], _BiasSet] = {}

    def _make(self, sampling: SamplingParams, prompt: Ints, end_tokens: tuple[int, ...], constraint: Constraint | None) -> _Governed:
        late = self._set(tuple(sampling.logit_bias), ())
        early = self._set(tuple(sampling.logit_bias), tuple(end_tokens)) if sampling.min_tokens else None
        return _Governed(sampling, prompt.copy(), constraint, early, late)

    def _set(self, biases: tuple[tuple[int, float], ...], ends: tuple[int, ...]) -> _BiasSet | None:
        if not biases and not ends:
            return None
        found = self._sets.setdefault((biases, ends), _BiasSet(biases, ends))
        found.users += 1
        return found

    def leave(self, sequence: Sequence) -> None:
        rules = self._of.get(sequence.serial)
        super().leave(sequence)
        if rules is None:
            return
        if rules.line >= 0:
            self._counts.give(rules.line)
        for unused in (rules.early, rules.late):
            if unused is None:
                continue
            unused.users -= 1
            if unused.users == 0:
                del self._sets[unused.biases, unused.ends]
                if unused.line >= 0:
                    self._biases.give(unused.line)

    @torch.inference_mode()
    def apply(self, logits: torch.Tensor, work: Work) -> RowRules | None:
        """Leaves the logits alone; what they are to be judged by."""
        if not self._of:
            return None
        size = len(logits)
        bias_rows, count_rows, mask_rows = (np.full(size, -1, np.int32) for _ in range(3))
        depth = np.zeros(size, np.int32)
        presence, frequency, repetition = np.zeros(size, np.float32), np.zeros(size, np.float32), np.ones(size, np.float32)
        lines = np.full(len(work.chunks), -1, np.int32)
        masks: list[NDArray[np.int32]] = []
        for index, (chunk, drafts, start) in enumerate(zip(work.chunks, work.drafts, work.step.row_starts.tolist(), strict=True)):
            rules = self._of.get(chunk.sequence.serial) if chunk.samples else None
            if rules is None:
                continue
            height = len(drafts) + 1
            rows = slice(start, start + height)
            short = min(max(rules.sampling.min_tokens - chunk.sequence.num_generated, 0), height)
            bias_rows[start : start + short] = self._line_of(rules.early)
            bias_rows[start + short : start + height] = self._line_of(rules.late)
            if rules.sampling.penalises:
                lines[index] = count_rows[rows] = self._counted(rules)
                depth[rows] = np.arange(height)
                presence[rows], frequency[rows] = rules.sampling.presence_penalty, rules.sampling.frequency_penalty
                repetition[rows] = rules.sampling.repetition_penalty
            if rules.constraint is not None:
                mask_rows[rows] = sum(map(len, masks)) + np.arange(height)
                masks.append(rules.constraint.masks(chunk.sequence.output, drafts)[:, : self._words])
        ints = (bias_rows, count_rows, mask_rows, depth, lines[work.step.row_counts > 0])
        floats = (presence, frequency, repetition)
        staged = all_to_device((*ints, *(part.view(np.int32) for part in floats)), self._device)
        places = staged[: len(ints)]
        presence_, frequency_, repetition_ = (part.view(torch.float32) for part in staged[len(ints) :])
        counts, prompts = self._counts.tables
        penalised = bool((count_rows >= 0).any())
        return RowRules(
            Biases(self._biases.tables[0], places[0]) if (bias_rows >= 0).any() else None,
            Penalties(counts, prompts, places[1], presence_, frequency_, repetition_, places[3]) if penalised else None,
            Allowed(to_device(np.concatenate(masks), self._device), places[2]) if masks else None,
            (counts, places[4]) if penalised else None,
        )

    def _line_of(self, biases: _BiasSet | None) -> int:
        if biases is None:
            return -1
        if biases.line < 0:
            biases.line = self._biases.take(biases.values(self._vocab))
        return biases.line

    def _counted(self, rules: _Governed) -> int:
        """Its line of counts. Before its first token is sampled there is nothing to count; from then on the device does it."""
        if rules.line < 0:
            prompt = None
            if rules.sampling.repetition_penalty != 1.0:
                bits = np.zeros(self._words * 32, np.uint8)
                bits[rules.prompt] = 1
                prompt = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
            rules.line = self._counts.take(None, prompt)
        return rules.line
