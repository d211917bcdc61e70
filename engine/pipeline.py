"""Decoding whose state lives on the device: the host launches a step without knowing what the step before it made.

Everything that the next step needs of the last one (tokens, lengths, drafts, the hidden states that a drafter reads) stays where it was
made; the host reads results one step late, while the device is already at the next. A request that is found to have ended therefore runs
one step too many, whose result is dropped. Only what the host decides travels to the device: who is in which slot, where its blocks are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

import kernels
from engine.batch import ForwardBatch
from engine.transfer import Arrival, to_device
from engine.types import COLDEST
from kernels.reference.sampling import NO_DRAFT, Mode, SampleRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from engine.batch import ForwardOutput, TargetModel
    from engine.graphs import Capture, Graph
    from engine.kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class DeviceDrafts:
    """tokens: int64 [S, D]. survival: float32 [S, D], falling along a row: the chance that a draft and all before it stand, in whatever
    weight its request has, not computed from that draft or any later one. bins: int64 [S, D], what calibration tells apart, for the host to
    learn from; None: nothing to learn.
    """

    tokens: torch.Tensor
    survival: torch.Tensor
    bins: torch.Tensor | None = None


class DeviceDrafter(Protocol):
    """Drafts without the host: from the state's tensors to tensors."""

    def __call__(self, state: DeviceState) -> DeviceDrafts:
        """Called inside a step, so nothing may be read back."""
        ...


@runtime_checkable
class ReadsTarget(Protocol):
    """A `DeviceDrafter` that goes by the target's hidden states. taps: their indices."""

    taps: tuple[int, ...]

    def observe(self, taps: dict[int, torch.Tensor], positions: torch.Tensor, slots: torch.Tensor) -> None:
        """The hidden states [T, hidden] of a step, by index; where its rows stand, int64 [T], and where their KV lies, int64 [T]: in block
        0 for rows that are no confirmed text. Inside a step as well.
        """
        ...


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One entry a slot. last: int64 [S], the newest token, whose KV is not there yet; length: int64 [S], its position; left: int64 [S],
    tokens that may still be made (0: the slot rests); made: int64 [S], tokens made so far; tables: int32 [S, W]; attempt: int64 [1].
    modes, temperatures, top_ks, top_ps, seeds: how the slot's tokens are chosen, as in `SampleRows`.
    """

    last: torch.Tensor
    length: torch.Tensor
    left: torch.Tensor
    made: torch.Tensor
    tables: torch.Tensor
    attempt: torch.Tensor
    modes: torch.Tensor
    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    seeds: torch.Tensor

    @staticmethod
    def empty(slots: int, width: int, device: torch.device) -> DeviceState:
        def longs(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        tables, modes, top_ks = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((slots, width), (slots,), (slots,)))
        last, length, left, made, seeds = (longs(slots) for _ in range(5))
        temperatures, top_ps = torch.ones(2, slots, device=device)
        return DeviceState(last, length, left, made, tables, longs(1), modes, temperatures, top_ks, top_ps, seeds)


@dataclass(frozen=True, slots=True)
class StepResult:
    """counts: int64 [S], tokens that each slot made in the step (0 for one at rest); tokens: int64 [S, D + 1], the first `counts[s]`
    of a row; finite: bool [S]. drafted, verified: int64 [S], drafts that were made and those that were judged; drafts, bins: int64 [S, D],
    as the drafter made them (the first `drafted[s]` of a row).
    """

    counts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    finite: NDArray[np.bool_]
    drafted: NDArray[np.int64]
    verified: NDArray[np.int64]
    drafts: NDArray[np.int64]
    bins: NDArray[np.int64]


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
        self._reader: ReadsTarget | None = drafter if isinstance(drafter, ReadsTarget) else None
        device = model.spec.device
        self._slots, self._drafts = slots, max_drafts
        self.state = DeviceState.empty(slots, width, device)
        self._result = torch.zeros(slots, 5 + 2 * max(max_drafts, 1), dtype=torch.int64, device=device)
        self._capture = capture
        self._graphs: dict[int, Graph] = {}
        self._capacities: dict[int, torch.Tensor] = {}
        self._in_flight: deque[Arrival] = deque()

    def enter(
        self,
        slot: int,
        *,
        last: int,
        length: int,
        left: int,
        blocks: list[int],
        made: int = 0,
        seed: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        grows: bool = False,
    ) -> None:
        """Puts a prefilled sequence into a slot: KV is valid for `length` tokens, `last` comes after them, `blocks` hold
        `length + left` tokens and `max_drafts` more, or where it `grows` the next step's, and others follow (`set_tables`). made: tokens
        that it made before. seed: of its noise (int64), with a temperature above 0. Raises ValueError for blocks that are too few, or more
        than a slot's table holds.
        """
        ahead = min(left, self._drafts + 1) if grows else left + self._drafts
        needed, width = -(-(length + ahead) // self._kv.block_size), self.state.tables.shape[1]
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
            (state.made, made),
            (state.modes, mode),
            (state.seeds, seed or 0),
            (state.top_ks, top_k),
            (state.top_ps, top_p),
        )
        for tensor, value in values:
            tensor[slot].fill_(value)
        state.temperatures[slot].fill_(1.0 if mode == Mode.GREEDY else temperature)

    def set_tables(self, tables: NDArray[np.int32]) -> None:
        """The blocks of all slots, [S, W], from the next launch on."""
        self.state.tables.copy_(to_device(tables, self.state.tables.device))

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
        counts, finite, drafted, verified, following = values[:, :5].T.copy()
        drafts, bins = np.split(values[:, 5:], 2, axis=1)
        tokens = np.concatenate((drafts, following[:, None]), axis=1)[:, : self._drafts + 1]
        tokens[np.arange(len(tokens)), np.maximum(counts - 1, 0)] = following
        return StepResult(counts, tokens, finite.astype(bool), drafted, verified, drafts.copy(), bins.copy())

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def max_drafts(self) -> int:
        return self._drafts

    @property
    def table_shape(self) -> tuple[int, int]:
        """Slots, and blocks that one's table has room for."""
        return self._slots, self.state.tables.shape[1]

    def _tensors(self) -> list[torch.Tensor]:
        state = self.state
        return [state.last, state.length, state.left, state.made, state.attempt]

    def _step(self, each: int, capacity: torch.Tensor) -> ForwardOutput:
        """Draft, choose, pack, run, judge, move on: all on the device. capacity: int64 [1], slots * each."""
        state, slots, most = self.state, self._slots, self._drafts
        device = state.last.device
        drafts = bins = torch.full((slots, max(most, 1)), NO_DRAFT, dtype=torch.int64, device=device)
        verify = drafted = torch.zeros(slots, dtype=torch.int64, device=device)
        active = state.left > 0
        if each > 0:
            assert self._drafter is not None
            made = self._drafter(state)
            drafts, bins = made.tokens, bins if made.bins is None else made.bins
            # A draft past the limit could only be thrown away.
            drafted = (state.left - 1).clamp(min=0, max=most)
            useful = torch.arange(most, device=device)[None] < drafted[:, None]
            verify = kernels.allocate_top(torch.where(useful, made.survival, 0.0), capacity)
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
            token_ids, position, kv_slots, tables, start, lengths, row, max_query=max(most + 1, total), max_kv=tables.shape[1] * size,
            taps=() if self._reader is None else self._reader.taps,
        )  # fmt: skip
        output = self._model.forward(batch, self._kv)
        judged = drafts[owner, index.clamp(min=0, max=drafts.shape[1] - 1)]
        judged = torch.where(pads | (index >= verify[owner]), NO_DRAFT, judged)
        proposed = torch.cat((drafts, bins), 1)
        accepted = self._judge(output.logits, judged, owner, index, start[: slots + 1], active, proposed, drafted, verify)
        if self._reader is not None:
            self._reader.observe(output.taps, position, torch.where(pads | (index > accepted[owner]), 0, kv_slots))
        return output

    def _judge(
        self,
        logits: torch.Tensor,
        judged: torch.Tensor,
        owner: torch.Tensor,
        index: torch.Tensor,
        start: torch.Tensor,
        active: torch.Tensor,
        proposed: torch.Tensor,
        drafted: torch.Tensor,
        verified: torch.Tensor,
    ) -> torch.Tensor:
        """Verdict, result and the state after the step. proposed: int64 [S, 2 D], drafts and bins. Returns what stands, int64 [S]."""
        state = self.state
        rows = SampleRows(
            state.modes[owner], state.temperatures[owner], state.top_ks[owner], state.top_ps[owner], state.seeds[owner],
            state.made[owner] + index, judged,
        )  # fmt: skip
        verdict = kernels.verify(logits, rows, state.attempt)
        if self._accept is not None:
            verdict.stands.copy_(self._accept(verdict.stands, state))
        accepted, following, finite = kernels.accept_drafts(verdict, start)
        made = torch.where(active, accepted + 1, 0)
        head = torch.stack((made, finite, drafted, verified, following), 1)
        self._result.copy_(torch.cat((head, proposed), 1))
        state.last.copy_(torch.where(active, following, state.last))
        state.length.add_(made)
        state.made.add_(made)
        state.left.sub_(made)
        state.attempt.add_(1)
        return accepted
