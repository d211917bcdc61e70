"""The forward in captured graphs: one replay instead of hundreds of launches, inputs prepared while the device is busy.

`GraphRunner` is the `Runner` of a GPU. A graph is captured the first time that its tier is met; steps larger than any tier, and all
new tiers once the memory for graphs is used up, run eagerly. The same code runs on a CPU with a call in place of the capture.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from engine.batch import ForwardBatch, ForwardOutput
from engine.runner import PackedStep, Runner
from engine.tiers import Tier, Tiers, pad

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import TargetModel
    from engine.kv_pool import KVPool

MAX_TOKENS = 512
"""Larger steps keep the device busy long enough that launches hide behind them."""
_MEMORY_SHARE = 0.05
"""Of the device's memory, for all graphs together."""
_WIDTHS = 4
"""Block tables are as wide as this to some power: all of a model's context would be megabytes a step for requests that use little of it."""
_STAGES = 2
"""Pinned buffers a tier: one is filled while the copy out of the other may still be under way."""


class Graph(Protocol):
    """Something captured: `replay` runs it on what the inputs hold now; the result is in `output`, until the next replay of any graph."""

    output: ForwardOutput

    def replay(self) -> None: ...


class Capture(Protocol):
    """Turns a call without arguments into a `Graph`; `used_bytes` of memory so far.

    A graph knows tensors by address alone: those that the call reads and did not make, its owner must keep.
    """

    used_bytes: int

    def __call__(self, call: Callable[[], ForwardOutput]) -> Graph: ...


class DirectCapture:
    """Replays by calling: for CPUs, and to look for errors without graphs on a GPU."""

    used_bytes = 0

    def __call__(self, call: Callable[[], ForwardOutput]) -> Graph:
        return _Direct(call)


class _Direct:
    def __init__(self, call: Callable[[], ForwardOutput]) -> None:
        self._call = call
        self.output = call()

    def replay(self) -> None:
        self.output = self._call()


class CudaCapture:
    """CUDA (or HIP) graphs that share one memory pool.

    Not through `torch.cuda.graph`, which gives everything that torch's allocators keep, pinned memory as well, back to the system before
    each capture: in the middle of a run, every step after it would have to ask for it again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self.used_bytes = 0

    def __call__(self, call: Callable[[], ForwardOutput]) -> Graph:
        try:
            return self._capture(call)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # what is kept cannot be given back while a capture is under way
            return self._capture(call)

    def _capture(self, call: Callable[[], ForwardOutput]) -> Graph:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            call()  # once outside: kernels are compiled, tuned and loaded there, none of which a capture allows
            torch.cuda.synchronize(self._device)
            before = torch.cuda.memory_reserved(self._device)
            graph = torch.cuda.CUDAGraph()
            # Other threads (one that trains a drafter, say) may go on allocating.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = call()
            except BaseException:
                with suppress(RuntimeError):  # that the capture is broken
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        self.used_bytes += max(torch.cuda.memory_reserved(self._device) - before, 0)
        return _Captured(graph, output)


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: ForwardOutput

    def replay(self) -> None:
        self.graph.replay()


class StaticInputs:
    """The tensors that a graph reads, and the pinned buffers that a step is written into on its way there."""

    def __init__(self, tier: Tier, rows: int, width: int, block_size: int, device: torch.device, taps: tuple[int, ...]) -> None:
        self._tier, self._rows, self._width = tier, rows, width
        slots = tier.sequences + 1
        self._sizes = (tier.tokens, tier.tokens, tier.tokens, tier.tokens, rows), (slots * width, slots + 1, slots)
        self._device = device
        self._longs = torch.zeros(sum(self._sizes[0]), dtype=torch.int64, device=device)
        self._ints = torch.zeros(sum(self._sizes[1]), dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._stages = [
            tuple(torch.zeros(like.shape, dtype=like.dtype, pin_memory=pinned) for like in (self._longs, self._ints))
            for _ in range(_STAGES)
        ]
        self._copied = [torch.cuda.Event() if pinned else None for _ in range(_STAGES)]
        self._turn = 0
        token_ids, positions, kv_slots, self.sources, logit_rows = self._longs.split(self._sizes[0])
        tables, query_start, kv_lengths = self._ints.split(self._sizes[1])
        self.batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=kv_slots,
            block_tables=tables.view(slots, width),
            query_start=query_start,
            kv_lengths=kv_lengths,
            logit_rows=logit_rows,
            max_query=tier.tokens,
            max_kv=width * block_size,
            taps=taps,
        )

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self._longs.nbytes + self._ints.nbytes

    def load(self, step: PackedStep) -> None:
        """Pads the step and sends it to the device, without waiting for it."""
        padded = pad(step, self._tier, self._rows, self._width)
        turn, self._turn = self._turn, (self._turn + 1) % _STAGES
        longs, ints = self._stages[turn]
        event = self._copied[turn]
        if event is not None:
            event.synchronize()  # of two loads ago: long done unless the host runs far ahead
        assert padded.sources is not None
        parts = (padded.token_ids, padded.positions, padded.slots, padded.sources, padded.logit_rows)
        for target, source in zip(longs.split(self._sizes[0]), parts, strict=True):
            target.copy_(torch.from_numpy(source))
        for target, values in zip(ints.split(self._sizes[1]), (padded.tables, padded.query_start, padded.kv_lengths), strict=True):
            target.copy_(torch.from_numpy(values.reshape(-1)))
        self._longs.copy_(longs, non_blocking=True)
        self._ints.copy_(ints, non_blocking=True)
        if event is not None:
            event.record(torch.cuda.current_stream(self._device))


class _Key(NamedTuple):
    """What a graph is for: tokens and sequence slots, logit rows, blocks of the longest context, hidden states wanted."""

    tier: Tier
    rows: int
    width: int
    taps: tuple[int, ...]


class GraphRunner(Runner):
    """A `Runner` whose output is valid until the next `run`."""

    def __init__(
        self, model: TargetModel, kv: KVPool, max_sequences: int, capture: Capture | None = None, memory: int | None = None
    ) -> None:
        super().__init__(model, kv, max_sequences)
        device = model.spec.device
        self.tiers = Tiers(MAX_TOKENS, max_sequences)
        self.capture = capture if capture is not None else CudaCapture(device)
        self._memory = memory if memory is not None else int(torch.cuda.get_device_properties(device).total_memory * _MEMORY_SHARE)
        self._width = max(-(-model.spec.max_positions // kv.block_size), -(-MAX_TOKENS // kv.block_size))
        self._graphs: dict[_Key, tuple[StaticInputs, Graph]] = {}
        self._input_bytes = 0
        self.eager_steps = 0

    @property
    def may_capture(self) -> bool:
        """Whether there is memory for another graph."""
        return self.capture.used_bytes + self._input_bytes < self._memory

    def spare(self, tokens: int, sequences: int) -> int:
        """See `Tiers.spare`."""
        return self.tiers.spare(tokens, sequences)

    @torch.inference_mode()
    def run(self, step: PackedStep, taps: tuple[int, ...] = (), *, peaks: bool = False) -> ForwardOutput:  # noqa: ARG002 - graphs have all
        """See `Runner.run`."""
        tier = self.tiers.of(step.num_tokens, len(step.kv_lengths))
        rows = len(step.logit_rows)
        if tier is None:
            self.eager_steps += 1
            return super().run(step, taps)
        # A step that only decodes has a row a sequence; where there are drafts any token may be one.
        key = _Key(tier, tier.sequences if rows <= tier.sequences else tier.tokens, self._table_width(step), taps)
        if key not in self._graphs and not self.may_capture:
            self.eager_steps += 1
            return super().run(step, taps)
        inputs, graph = self._graphs.get(key) or self._captured(key, step)
        inputs.load(step)
        graph.replay()
        output = graph.output
        return ForwardOutput(output.logits[:rows], {index: tap[: step.num_tokens] for index, tap in output.taps.items()})

    def _table_width(self, step: PackedStep) -> int:
        """Blocks that the step's tables have room for; padding rows are a sequence of up to MAX_TOKENS tokens."""
        needed = max(step.tables.shape[1], -(-MAX_TOKENS // self.kv.block_size))
        width = _WIDTHS
        while width < needed:
            width *= _WIDTHS
        return min(width, self._width)

    def _captured(self, key: _Key, step: PackedStep) -> tuple[StaticInputs, Graph]:
        inputs = StaticInputs(key.tier, key.rows, key.width, self.kv.block_size, self.model.spec.device, key.taps)
        inputs.load(step)
        self._input_bytes += inputs.nbytes

        def forward() -> ForwardOutput:
            token_ids = self.resolve(inputs.batch.token_ids, inputs.sources)
            return self.model.forward(replace(inputs.batch, token_ids=token_ids), self.kv)

        self._graphs[key] = inputs, self.capture(forward)
        return self._graphs[key]
