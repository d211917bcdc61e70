"""Decoding whose state lives on the device: the host launches a step without knowing what the step before it made.

Everything that the next step needs of the last one (tokens, lengths, drafts) stays where it was made; the host reads results one step late,
while the device is already at the next. A request that is found to have ended therefore runs one step too many, whose result is dropped.
Only what the host decides travels to the device: who is in which slot, and where its blocks are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

import kernels
from engine.batch import ForwardBatch
from engine.transfer import Arrival
from engine.types import COLDEST
from kernels.reference.sampling import NO_DRAFT, Mode, SampleRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from engine.batch import ForwardOutput, TargetModel
    from engine.graphs import Capture, Graph
    from engine.kv_pool import KVPool


class DeviceDrafter(Protocol):
    """Drafts without the host: from the state's tensors to tensors."""

    def __call__(self, state: DeviceState) -> tuple[torch.Tensor, torch.Tensor]:
        """(drafts int64 [S, D], their survival float32 [S, D]: the chance that a draft and all before it stand, not computed from it or any
        later one); called inside a step, so nothing may be read back.
        """
        ...


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One entry a slot. last: int64 [S], the newest token, whose KV is not there yet; length: int64 [S], its position; left: int64 [S],
    tokens that may still be made (0: the slot rests); made: int64 [S], tokens made so far; tables: int32 [S, W]; attempt: int64 [1].
    modes, temperatures, seeds: how the slot's tokens are chosen, as in `SampleRows`.
    """

    last: torch.Tensor
    length: torch.Tensor
    left: torch.Tensor
    made: torch.Tensor
    tables: torch.Tensor
    attempt: torch.Tensor
    modes: torch.Tensor
    temperatures: torch.Tensor
    seeds: torch.Tensor

    @staticmethod
    def empty(slots: int, width: int, device: torch.device) -> DeviceState:
        def longs(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        tables, modes = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((slots, width), (slots,)))
        temperatures = torch.ones(slots, device=device)
        return DeviceState(longs(slots), longs(slots), longs(slots), longs(slots), tables, longs(1), modes, temperatures, longs(slots))


@dataclass(frozen=True, slots=True)
class StepResult:
    """counts: int64 [S], tokens that each slot made in the step (0 for one at rest); tokens: int64 [S, D + 1], the first `counts[s]`
    of a row; finite: bool [S].
    """

    counts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    finite: NDArray[np.bool_]


class DecodePipeline:
    """Steps of up to `slots` sequences with up to `max_drafts` drafts each. How many drafts are verified in all is fixed when a step is
    launched, before any is drawn, and with it the step's shape: S slots, T = S (1 + drafts) rows. Whose they are is decided on the device,
    by survival (the fixed-capacity form of DSpark's scheduler, arXiv 2607.05147): every row of a shape is computed, so none is left over.
    """

    def __init__(
        self,
        model: TargetModel,
        kv: KVPool,
        *,
        slots: int,
        width: int,
        capture: Capture,
        max_drafts: int = 0,
        drafter: DeviceDrafter | None = None,
        accept: Callable[[torch.Tensor, DeviceState], torch.Tensor] | None = None,
    ) -> None:
        """width: blocks of the longest sequence. accept: replaces the verdict on drafts (stands bool [R] -> bool [R]), for benchmarks
        that replay a stated acceptance process; never with real text. Raises ValueError for drafts without a drafter.
        """
        if (max_drafts > 0) != (drafter is not None):
            raise ValueError(f"{max_drafts} drafts a step and {'a' if drafter else 'no'} drafter do not go together")
        self._model, self._kv, self._drafter, self._accept = model, kv, drafter, accept
        device = model.spec.device
        self._slots, self._drafts = slots, max_drafts
        self.state = DeviceState.empty(slots, width, device)
        self._result = torch.zeros(slots, max_drafts + 3, dtype=torch.int64, device=device)
        self._capture = capture
        self._graphs: dict[int, Graph] = {}
        self._capacities: dict[int, torch.Tensor] = {}
        self._in_flight: deque[Arrival] = deque()

    def enter(
        self, slot: int, *, last: int, length: int, left: int, blocks: list[int], seed: int | None = None, temperature: float = 0.0
    ) -> None:
        """Puts a prefilled sequence into a slot: KV is valid for `length` tokens, `last` comes after them, `blocks` hold
        `length + left` tokens and `max_drafts` more. seed: of its noise, with a temperature above 0. Raises ValueError for blocks that are
        too few, or more than a slot's table holds.
        """
        needed, width = -(-(length + left + self._drafts) // self._kv.block_size), self.state.tables.shape[1]
        if not needed <= len(blocks) <= width:
            raise ValueError(
                f"{length} + {left} tokens and {self._drafts} drafts need {needed} blocks of at most {width}, got {len(blocks)}"
            )
        state = self.state
        row = torch.zeros(state.tables.shape[1], dtype=torch.int32)
        row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        state.tables[slot].copy_(row, non_blocking=True)
        mode = Mode.GREEDY if temperature < COLDEST else Mode.SEEDED
        values = (
            (state.last, last),
            (state.length, length),
            (state.left, left),
            (state.made, 0),
            (state.modes, mode),
            (state.seeds, seed or 0),
        )
        for tensor, value in values:
            tensor[slot].fill_(value)
        state.temperatures[slot].fill_(temperature or 1.0)

    def retire(self, slot: int) -> None:
        """Lets a slot rest from the next launch on; what is in flight of it is the caller's to drop."""
        self.state.left[slot].fill_(0)

    @torch.inference_mode()
    def launch(self, drafts: int | None = None) -> None:
        """Starts a step that verifies `drafts` drafts a slot on average (None: as many as there can be), and sends its result on its way,
        without waiting for either. Without drafts nobody is asked for any. Raises ValueError for more than `max_drafts`.
        """
        drafts = self._drafts if drafts is None else drafts
        if not 0 <= drafts <= self._drafts:
            raise ValueError(f"a step of this pipeline verifies 0 to {self._drafts} drafts a slot, got {drafts}")
        graph = self._graphs.get(drafts)
        if graph is None:
            before = [tensor.clone() for tensor in self._tensors()]
            capacity = self._capacities[drafts] = torch.full((1,), self._slots * drafts, dtype=torch.int64, device=self._result.device)
            graph = self._graphs[drafts] = self._capture(lambda: self._step(drafts, capacity))
            for tensor, value in zip(self._tensors(), before, strict=True):
                tensor.copy_(value)  # whatever capturing ran has not happened
        graph.replay()
        arrival = Arrival((tuple(self._result.shape), torch.int64), device=self._result.device)
        arrival.send(self._result)
        self._in_flight.append(arrival)

    def collect(self) -> StepResult:
        """The oldest result that was not collected yet; waits for it. Raises IndexError if nothing is in flight."""
        (values,) = self._in_flight.popleft().read()
        return StepResult(values[:, 0].copy(), values[:, 2:].copy(), values[:, 1].astype(bool))

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def _tensors(self) -> list[torch.Tensor]:
        state = self.state
        return [state.last, state.length, state.left, state.made, state.attempt]

    def _step(self, each: int, capacity: torch.Tensor) -> ForwardOutput:
        """Draft, choose, pack, run, judge, move on: all on the device. capacity: int64 [1], slots * each."""
        state, slots, most = self.state, self._slots, self._drafts
        device = state.last.device
        drafts = torch.full((slots, max(most, 1)), NO_DRAFT, dtype=torch.int64, device=device)
        verify = torch.zeros(slots, dtype=torch.int64, device=device)
        active = state.left > 0
        if each > 0:
            assert self._drafter is not None
            drafts, survival = self._drafter(state)
            # A draft past the limit could only be thrown away.
            useful = torch.arange(most, device=device)[None] < (state.left - 1)[:, None]
            verify = kernels.allocate_top(torch.where(useful, survival, 0.0), capacity)
        rows = torch.where(active, verify + 1, 0)
        ends = rows.cumsum(0)
        total = slots * (each + 1)
        row = torch.arange(total, device=device)
        owner = torch.searchsorted(ends, row, right=True)
        pads = owner >= slots
        owner = owner.clamp(max=slots - 1)
        index = row - (ends - rows)[owner]
        before = drafts[owner, (index - 1).clamp(min=0, max=drafts.shape[1] - 1)]
        token_ids = torch.where(pads, 0, torch.where(index == 0, state.last[owner], before))
        # Rows that nobody needs are a sequence of their own in block 0, as in engine.tiers.pad.
        position = torch.where(pads, row - ends[-1], state.length[owner] + index)
        size = self._kv.block_size
        block = state.tables[owner, (position // size).clamp(max=state.tables.shape[1] - 1)]
        kv_slots = torch.where(pads, 0, block * size + position % size)
        start = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), total))).to(torch.int32)
        lengths = torch.cat((torch.where(active, state.length + rows, 0), (total - ends[-1])[None])).to(torch.int32)
        tables = torch.cat((state.tables, torch.zeros_like(state.tables[:1])))
        batch = ForwardBatch(
            token_ids, position, kv_slots, tables, start, lengths, row, max_query=max(most + 1, total), max_kv=tables.shape[1] * size
        )
        output = self._model.forward(batch, self._kv)
        drafted = drafts[owner, index.clamp(min=0, max=drafts.shape[1] - 1)]
        drafted = torch.where(pads | (index >= verify[owner]), NO_DRAFT, drafted)
        self._judge(output.logits, drafted, owner, index, start[: slots + 1], drafts, active)
        return output

    def _judge(
        self,
        logits: torch.Tensor,
        drafted: torch.Tensor,
        owner: torch.Tensor,
        index: torch.Tensor,
        start: torch.Tensor,
        drafts: torch.Tensor,
        active: torch.Tensor,
    ) -> None:
        """Verdict, result and the state after the step."""
        state = self.state
        count, none = len(owner), torch.ones_like(state.temperatures[owner])
        rows = SampleRows(
            state.modes[owner], state.temperatures[owner], torch.zeros(count, dtype=torch.int32, device=owner.device), none,
            state.seeds[owner], state.made[owner] + index, drafted,
        )  # fmt: skip
        verdict = kernels.verify(logits, rows, state.attempt)
        if self._accept is not None:
            verdict.stands.copy_(self._accept(verdict.stands, state))
        accepted, following, finite = kernels.accept_drafts(verdict, start)
        made = torch.where(active, accepted + 1, 0)
        columns = torch.arange(self._drafts + 1, device=owner.device)[None]
        padded = torch.cat((drafts, drafts[:, :1]), 1)[:, : self._drafts + 1]
        tokens = torch.where(columns == accepted[:, None], following[:, None], padded)
        self._result.copy_(torch.cat((made[:, None], finite[:, None], tokens), 1))
        state.last.copy_(torch.where(active, following, state.last))
        state.length.add_(made)
        state.made.add_(made)
        state.left.sub_(made)
        state.attempt.add_(1)
