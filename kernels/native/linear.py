"""Matrix products with packed weights, in float32: one register tile, written once and unrolled for every number of rows.

A weight [N, K] is stored as panels of 2 vectors of output columns, [N / width][K][width]: a step of the inner loop loads two vectors of
the panel, broadcasts one number of each of up to 6 rows (12 with AVX-512), and does two multiply-adds with each, which keeps both
multipliers of the core busy (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008). Few rows take several
panels at once instead, for the same number of independent sums. While a panel is multiplied the next one is asked for.

Every output is one running sum over K in order, whatever the number of rows: a row's result does not depend on who shares the batch,
to the last bit. 2 cores, AVX2 (Zen 3), all products of a 135M-parameter Llama, milliseconds here / oneDNN's prepacked, each at its best
moment: 1 row 17 / 43, 4: 22 / 60, 16: 26 / 68, 64: 71 / 170, 128: 131 / 273 (207 GFLOP/s; multiply-adds on registers alone, in another
minute, 183 to 189). In turns over minutes with neighbours on the machine 64 rows take 90 to 107, 125 to 150 GFLOP/s.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

from kernels.native.emit import F32, I8, I64
from kernels.native.jit import Kernel, build, lanes, threads_for
from kernels.native.program import Call
from kernels.pages import lasting_zeros

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llvmlite import ir

    from kernels.native.emit import Emitter, Variable

_ROWS, _ROWS_AVX512 = 6, 12
"""Rows of a tile at most: two vectors of sums for each fill the registers, of which AVX-512 has twice as many."""
_PANELS, _PANELS_AVX512 = {1: 4, 2: 2, 3: 2}, {1: 4, 2: 2, 3: 2, 4: 2}
"""Panels that a tile of so few rows takes at once; more rows take one."""
_GROUP = 4
"""Most panels that a thread takes at a time."""
_STEPS, _STEPS_AVX512 = 4, 2
"""Of the inner loop, in one go."""
_CACHE_LINE = 64
"""Bytes."""
_CACHED_ROWS = 96
"""Rows that are worked off for one panel before the next: they are to stay in the second-level cache. A multiple of either tile."""
_CACHED_DEPTH = 576
"""Longest stretch of K in one go: its part of a panel (2 vectors x 576 x 4 bytes = 36 KiB) streams past the first-level cache."""

ACTIVATIONS = ("silu", "gelu_tanh", "relu")
"""Gated activations that are fused into the product."""


def panel_width() -> int:
    return 2 * lanes()


def most_rows() -> int:
    """Of a tile."""
    return _ROWS_AVX512 if lanes() == 16 else _ROWS


def _panels_at_once() -> dict[int, int]:
    return _PANELS_AVX512 if lanes() == 16 else _PANELS


def empty_panels(columns: int, depth: int, dtype: torch.dtype) -> torch.Tensor:
    """[ceil(columns / width), depth, width] for a weight [columns, depth], float32 or int8: zeros, where there are no more columns, too."""
    width = panel_width()
    return lasting_zeros((-(-columns // width), depth, width), dtype)  # every step streams all weights past the page table


def halves(panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of panels of a gated product: the first vector, which holds columns of the gate, and the second, with the same columns of up."""
    return panels[:, :, : lanes()], panels[:, :, lanes() :]


def write(panels: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    """Rows [n, K] of a weight, of any type, into its panels (or one of their `halves`) as columns `first` to `first + n`."""
    columns, width = panels.transpose(1, 2), panels.shape[2]
    start, offset = divmod(first, width)
    begun = min(width - offset, len(rows)) if offset else 0
    if begun:
        columns[start, offset : offset + begun] = rows[:begun]
        start += 1
    whole, rest = divmod(len(rows) - begun, width)
    if whole:
        columns[start : start + whole] = rows[begun : begun + whole * width].unflatten(0, (whole, width))
    if rest:
        columns[start + whole, :rest] = rows[len(rows) - rest :]


def pair_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """One number an output of each, [N] -> [2 * N] in the order of the panels."""
    return torch.stack((gate.view(-1, lanes()), up.view(-1, lanes())), dim=1).flatten()


def pad_outputs(numbers: torch.Tensor) -> torch.Tensor:
    """One number an output: [N] -> [whole panels]."""
    padded = numbers.new_zeros(-(-len(numbers) // panel_width()) * panel_width())
    padded[: len(numbers)] = numbers
    return padded


def product(
    x: torch.Tensor,
    packed: torch.Tensor,
    columns: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] (rows may lie apart) @ weight.T (+ bias [N, padded to whole panels]) (+ residual [T, N]) -> [T, N]."""
    width = packed.shape[0] * packed.shape[2]
    out = x.new_empty(x.shape[0], width)
    fits = residual is not None and width == columns and residual.is_contiguous()
    call(x, packed, out, bias, residual if fits else None, scales).run()
    out = out[:, :columns]
    return out if fits or residual is None else out.add_(residual)


def gated_product(x: torch.Tensor, packed: torch.Tensor, activation: str, scales: torch.Tensor | None = None) -> torch.Tensor:
    """activation(x @ gate.T) * (x @ up.T) -> [T, N]. `packed`: panels with a gate and an up half."""
    out = x.new_empty(x.shape[0], packed.shape[0] * packed.shape[2] // 2)
    call(x, packed, out, None, None, scales, activation).run()
    return out


CHANGING = (2, 11)
"""Arguments of `call` that go with the number of rows alone."""


def call(
    x: torch.Tensor,
    packed: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scales: torch.Tensor | None,
    activation: str = "",
) -> Call:
    """The product into `out`, which may be `residual` itself."""
    threads = threads_for(x.numel() * out.shape[1] // 8)
    # Threads are to end together, so each takes from a small weight one panel after the other; few rows take several at once.
    group = _GROUP if x.shape[0] in _panels_at_once() else max(min(_GROUP, packed.shape[0] // (8 * threads)), 1)
    arguments = (
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        x.shape[1],
        packed.data_ptr(),
        packed.shape[0],
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        group,
    )
    return Call(_kernel(activation, bias is not None, residual is not None, scales is not None), threads, arguments)


@cache
def _kernel(activation: str, has_bias: bool, has_residual: bool, int8: bool) -> Kernel:
    return build(f"product_{activation}", lambda e: _Product(e, activation, has_bias, has_residual, int8).emit())


class _Product:
    """Writes the kernel. Arguments: see `call`; the one after them counts the panels that were handed out."""

    def __init__(self, e: Emitter, activation: str, has_bias: bool, has_residual: bool, int8: bool) -> None:
        self.e = e
        self.activation = activation
        self.x, self.x_stride, self.rows, self.depth = e.pointer(0), e.argument(1), e.argument(2), e.argument(3)
        self.weight, self.panels, self.out, self.out_stride = e.pointer(4), e.argument(5), e.pointer(6), e.argument(7)
        self.bias = e.pointer(8) if has_bias else None
        self.residual = e.pointer(9) if has_residual else None
        self.scales = e.pointer(10) if int8 else None
        self.number = I8 if int8 else F32
        """Of the weight."""
        self.steps = _STEPS_AVX512 if e.lanes == 16 else _STEPS
        self.group = e.argument(11)
        self.counter = e.at(e.function.args[0], 12, I64)
        self.width = 2 * e.lanes
        self.lines_read = -(-self.width * self.steps * (1 if int8 else 4) // _CACHE_LINE)
        """Of a panel, in one go."""
        self.few = _panels_at_once()
        self.sums = e.scratch(max(_CACHED_ROWS * self.width, max(self.few) * self.width * _GROUP))
        self.most = most_rows()

    def emit(self) -> None:
        e = self.e
        with (
            e.shares_ahead(self.counter, self.panels, self.group) as (first, last, following),
            e.range(0, self.rows, _CACHED_ROWS) as top,
        ):
            rows = e.least(e.sub(self.rows, top), _CACHED_ROWS)
            for count, at_once in self.few.items():
                with e.when(e.equal(rows, count)):
                    self._few(count, at_once, top, first, last)
            with e.when(e.b.icmp_signed(">", rows, e.const(max(self.few)))):
                self._many(top, rows, first, last, following)

    def _few(self, count: int, at_once: int, row: ir.Value, first: ir.Value, last: ir.Value) -> None:
        e = self.e
        paired = e.add(first, e.mul(e.div(e.sub(last, first), at_once), at_once))
        with e.range(first, paired, at_once) as panel, self._stretches() as stretch:
            self._tile(count, at_once, row, e.const(0), panel, stretch)
        with e.range(paired, last) as panel, self._stretches() as stretch:
            self._tile(count, 1, row, e.const(0), panel, stretch)

    def _many(self, top: ir.Value, rows: ir.Value, first: ir.Value, last: ir.Value, following: ir.Value) -> None:
        e = self.e
        with e.range(first, last) as panel:
            after = e.add(panel, 1)
            after = e.b.select(e.less(after, last), after, following)
            with self._stretches() as stretch:
                ahead = self._ahead(panel, after, stretch)

                def multiply(count: int, row: ir.Value, tile: ir.Value, tiles: ir.Value) -> None:
                    self._tile(count, 1, row, e.sub(row, top), panel, stretch, (ahead, tile, tiles))

                e.in_tiles(top, rows, range(min(max(self.few) + 1, (self.most + 1) // 2), self.most + 1), multiply)

    def _ahead(self, panel: ir.Value, after: ir.Value, stretch: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Where the weights lie that are wanted next: the tiles of a stretch ask for them, each for its part.

        Without it the first tile of a panel waits for memory, and the tiles after it leave the memory idle.
        """
        e, (start, length) = self.e, stretch
        end = e.add(start, length)
        more = e.less(end, self.depth)
        panel, start = e.b.select(more, panel, after), e.b.select(more, end, e.const(0))
        return e.at(self.weight, e.mul(e.add(e.mul(panel, self.depth), start), self.width), self.number)

    @contextmanager
    def _stretches(self) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Yields (start, length) of each stretch of K."""
        with self.e.range(0, self.depth, _CACHED_DEPTH) as start:
            yield start, self.e.least(self.e.sub(self.depth, start), _CACHED_DEPTH)

    def _tile(
        self,
        count: int,
        panels: int,
        row: ir.Value,
        place: ir.Value,
        panel: ir.Value,
        stretch: tuple[ir.Value, ir.Value],
        ahead: tuple[ir.Value, ir.Value, ir.Value] | None = None,
    ) -> None:
        """`count` rows from `row` on times `panels` panels, over a stretch of K; `sums` keeps these rows at `place` between stretches.

        `ahead`: weights to ask for meanwhile, as many as this tile reads, and which part of them is its: (from where, which, of how many).
        """
        e, (start, length) = self.e, stretch
        vectors = 2 * panels
        kept = e.at(self.sums, e.mul(place, self.width))
        lines = e.apart([e.at(self.x, e.add(e.mul(self.x_stride, e.add(row, index)), start)) for index in range(count)])
        panel_size = e.mul(self.depth, self.width)
        weights = [
            e.at(self.weight, e.add(e.mul(e.add(panel, index), panel_size), e.mul(start, self.width)), self.number)
            for index in range(panels)
        ]
        begun = e.b.icmp_signed(">", start, e.const(0))
        sums = [
            [
                e.variable(e.b.select(begun, e.load_vector(kept, (index * vectors + vector) * e.lanes), e.splat(0.0)))
                for vector in range(vectors)
            ]
            for index in range(count)
        ]
        even = e.mul(e.div(length, self.steps), self.steps)

        def multiply(wanted: ir.Value, each: ir.Value, asked: int) -> None:
            """While `each` numbers a step of k are asked for, by `asked` lines of the cache in one go."""
            with e.range(0, even, self.steps) as k:
                for line in range(asked):
                    at = e.add(e.mul(k, each), e.div(e.mul(each, line * self.steps), asked))
                    e.prefetch(e.at(wanted, at, self.number), e.const(0))
                self._multiply(sums, lines, weights, k, self.steps)

        if ahead is None:
            multiply(self.weight, e.const(0), 0)
        else:
            wanted, tile, tiles = ahead
            each = e.div(e.add(tiles, self.width - 1), tiles)
            wanted = e.at(wanted, e.mul(e.mul(tile, length), each), self.number)
            # Of so many tiles each asks for no more than a line in one go: to ask for it once is cheaper than to ask for its parts.
            with e.b.if_else(e.less(tiles, self.lines_read)) as (few, many):
                with few:
                    multiply(wanted, each, self.lines_read)
                with many:
                    multiply(wanted, each, 1)
        with e.range(even, length) as k:
            self._multiply(sums, lines, weights, k, 1)
        with e.b.if_else(e.less(e.add(start, length), self.depth)) as (unfinished, done):
            with unfinished:
                for index in range(count):
                    for vector in range(vectors):
                        e.store(sums[index][vector].get(), kept, (index * vectors + vector) * e.lanes)
            with done:
                for index in range(count):
                    for number in range(panels):
                        pair = sums[index][2 * number : 2 * number + 2]
                        self._write(e.add(row, index), e.add(panel, number), pair[0].get(), pair[1].get())

    def _multiply(self, sums: list[list[Variable]], lines: list[ir.Value], weights: list[ir.Value], k: ir.Value, steps: int) -> None:
        e = self.e
        load = e.load_vector if self.scales is None else e.load_int8_vector
        panels = [e.at(panel, e.mul(k, self.width), self.number) for panel in weights]
        for step in range(steps):
            columns = [load(panel, step * self.width + half * e.lanes) for panel in panels for half in (0, 1)]
            for line, row_sums in zip(lines, sums, strict=True):
                number = e.splat(e.load(line, e.add(k, step)))
                for column, total in zip(columns, row_sums, strict=True):
                    total.set(e.fma(number, column, total.get()))

    def _write(self, row: ir.Value, panel: ir.Value, first: ir.Value, second: ir.Value) -> None:
        e = self.e
        if self.scales is not None:
            column = e.mul(panel, self.width)
            first = e.b.fmul(first, e.load_vector(self.scales, column))
            second = e.b.fmul(second, e.load_vector(self.scales, e.add(column, e.lanes)))
        if self.activation:
            gated = e.b.fmul(_activate(e, self.activation, first), second)
            e.store(gated, self.out, e.add(e.mul(row, self.out_stride), e.mul(panel, e.lanes)))
            return
        column = e.mul(panel, self.width)
        for half, value in enumerate((first, second)):
            at = e.add(column, half * e.lanes)
            if self.bias is not None:
                value = e.b.fadd(value, e.load_vector(self.bias, at))
            at = e.add(at, e.mul(row, self.out_stride))
            if self.residual is not None:
                value = e.b.fadd(value, e.load_vector(self.residual, at))
            e.store(value, self.out, at)


def _activate(e: Emitter, activation: str, x: ir.Value) -> ir.Value:
    if activation == "relu":
        return e.maximum(x, e.splat(0.0))
    if activation == "silu":
        inner = x
    else:  # gelu_tanh: 0.5 * x * (1 + tanh(u)) = x * sigmoid(2 * u), u = sqrt(2 / pi) * (x + 0.044715 * x**3)
        cubic = e.fma(e.b.fmul(x, x), e.splat(2 * 0.7978845608028654 * 0.044715), e.splat(2 * 0.7978845608028654))
        inner = e.b.fmul(x, cubic)
    return e.b.fdiv(x, e.b.fadd(e.splat(1.0), e.exp(e.minimum(e.b.fneg(inner), e.splat(88.0)))))
