"""The highest output of a product without all of the product: what cannot be the highest is ruled out in eight bits, the rest computed.

Greedy decoding wants one number of the output head's 50,000 or more a row. A weight row w is kept a second time as s q, q in eight bits;
inputs x are rounded to t y, y in sixteen. Then by Cauchy and Schwarz, however the numbers fall,

    |w x - s t (q y)| <= |w - s q| |x| + |s q| |x - t y| <= b |x|

with one b a row of the weight, worked out when it is packed, the rounding of either product included. So no output of a panel can be above
the highest of s t (q y) + b |x| in it. The panel where that is highest is computed in full, and after it those that could hold as much as
the highest output found: three of 3,072 on average, in a trained head. What comes out is that of the full product to the last bit,
whichever of equal outputs comes first included.

A quarter of the bytes is read, and integers of sixteen bits are multiplied twice as fast as floats. 2 cores, AVX2, the head of a model of
135M parameters (49,152 x 576), milliseconds of the product and its peaks / screened: 1 row 5.9 / 2.2, 4: 8.4 / 2.2, 8: 9.1 / 3.2,
16: 10.0 / 4.3, 32: 15.1 / 9.4, 64: 27.2 / 15.7, 128: 52.7 / 31.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from kernels.native.emit import F32, I8, I16, I32, I64
from kernels.native.jit import Kernel, build, lanes, threads_for
from kernels.native.linear import most_rows
from kernels.native.rows import float_bits, keep_first
from kernels.pages import lasting_zeros

if TYPE_CHECKING:
    from llvmlite import ir

    from kernels.native.emit import Emitter, Variable

MOST_DEPTH = 4096
"""Beyond it the sums of products would leave so few bits to inputs that too much could not be ruled out."""
_LARGEST = 127
_TINY = 1e-30
"""Numbers below it are rounded as if it were their row's largest."""
_SPARE = 32
"""Operations on top of a product's own whose rounding, 2**-24 each, is allowed for."""
_MARGIN = 1.01
"""For what the bounds themselves are off by."""
_CACHED_ROWS = 192
"""Rows that are worked off for one panel before the next: in sixteen bits, they are to stay in the second-level cache."""
_UNROLL = 2
_GROUP = 4
"""Most panels that a thread takes at a time."""
_CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class Screen:
    """Beside panels [P, K, width] of a weight. numbers: int8 [P, K / 2, width, 2], its rows in steps of `scales` float32 [P * width]; two
    of a row lie together. bounds: float32 [P * width], how far an output can be from what they say, as a share of the input's length.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    bounds: torch.Tensor


def fits(depth: int) -> bool:
    """Whether a weight of this depth can be screened: whole vectors, and not too deep."""
    return depth % (2 * lanes()) == 0 and depth <= MOST_DEPTH


def screen(panels: torch.Tensor, columns: int) -> Screen | None:
    """Of float32 panels [P, K, width] with `columns` outputs; None for a weight with numbers that are none."""
    count, depth, width = panels.shape
    numbers = lasting_zeros((count, depth // 2, width, 2), torch.int8)
    scales, bounds = torch.empty(2, count, width)
    # An input is off by half a step at most, in each of K places, and its largest number is at most its length.
    share = 0.5 * math.sqrt(depth) / _input_steps(depth)
    rounding = (depth + _SPARE) * 2.0**-24
    _pack_kernel()(
        threads_for(panels.numel()), panels.data_ptr(), count, depth, numbers.data_ptr(), scales.data_ptr(), bounds.data_ptr(),
        float_bits(share), float_bits(rounding),
    )  # fmt: skip
    if not bounds.isfinite().all():
        return None
    if missing := count * width - columns:
        # What pads the last panel says no more than an output beside it, or it would be looked at every time.
        numbers[-1, :, width - missing :] = numbers[-1, :, :1]
        scales[-1, width - missing :], bounds[-1, width - missing :] = scales[-1, 0], bounds[-1, 0]
    return Screen(numbers, scales.flatten(), bounds.flatten())


@cache
def _pack_kernel() -> Kernel:
    return build("pack_screen", _emit_pack)


def _emit_pack(e: Emitter) -> None:
    """See `Screen`. Arguments: panels, how many, their depth; numbers, scales, bounds; of the bounds, what inputs and rounding add."""
    panels, count, depth = e.pointer(0), e.argument(1), e.argument(2)
    numbers, scales, bounds = e.pointer(3), e.pointer(4), e.pointer(5)
    share, rounding = e.splat(e.argument_float(6)), e.splat(e.argument_float(7))
    width = 2 * e.lanes
    with e.shares(e.at(e.function.args[0], 8, I64), count, 1) as (panel, _), e.range(0, width, e.lanes) as half:
        source = e.at(panels, e.add(e.mul(panel, e.mul(depth, width)), half))
        target = e.at(numbers, e.add(e.mul(panel, e.mul(depth, width)), e.mul(half, 2)), I8)
        largest = e.variable(e.splat(_TINY))
        with e.range(0, depth) as k:
            largest.set(e.maximum(e.absolute(e.load_vector(source, e.mul(k, width))), largest.get()))
        factor, scale = e.b.fdiv(e.splat(_LARGEST), largest.get()), e.b.fdiv(largest.get(), e.splat(_LARGEST))
        off, kept, length = (e.variable(e.splat(0.0)) for _ in range(3))
        with e.range(0, depth, 2) as k:
            pair: list[ir.Value] = []
            for step in range(2):
                value = e.b.fmul(e.load_vector(source, e.mul(e.add(k, step), width)), factor)
                number = e.round(value)
                for total, part in ((off, e.b.fsub(value, number)), (kept, number), (length, value)):
                    total.set(e.fma(part, part, total.get()))
                pair.append(number)
            e.store_int8_pairs(pair[0], pair[1], target, e.mul(k, width))
        bound = e.fma(e.square_root(kept.get()), share, e.square_root(off.get()))
        bound = e.fma(e.square_root(length.get()), rounding, bound)
        place = e.add(e.mul(panel, width), half)
        e.store(scale, scales, place)
        e.store(e.b.fmul(e.b.fmul(bound, e.splat(_MARGIN)), scale), bounds, place)


def _input_steps(depth: int) -> int:
    """Of an input's largest number: as many as leave the sum of K products within 32 bits."""
    return min((1 << 15) - 1, ((1 << 31) - 1) // (_LARGEST * depth))


def peaks(x: torch.Tensor, panels: torch.Tensor, columns: int, screen: Screen) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.native.rows.peaks` of x [T, K] @ weight.T: float32 [T], NaN for a row that is not finite, and int64 [T]."""
    rows, depth = x.shape
    count = len(panels)
    values, places = x.new_empty(rows), torch.empty(rows, dtype=torch.int64)
    highest = x.new_empty(rows, -(-count // lanes()) * lanes())
    highest[:, count:] = -torch.inf
    lengths = _multiply(x, screen, highest, whole=False)
    _decide_kernel()(
        threads_for(rows * depth * panels.shape[2]), x.data_ptr(), x.stride(0), rows, depth, panels.data_ptr(), columns,
        highest.data_ptr(), highest.stride(0), lengths.data_ptr(), values.data_ptr(), places.data_ptr(),
    )  # fmt: skip
    return values, places


def rough_product(x: torch.Tensor, screen: Screen, columns: int) -> torch.Tensor:
    """s t (q y): about x [T, K] @ weight.T, float32 [T, columns]."""
    out = x.new_empty(len(x), len(screen.scales))
    _multiply(x, screen, out, whole=True)
    return out[:, :columns]


def _multiply(x: torch.Tensor, screen: Screen, out: torch.Tensor, *, whole: bool) -> torch.Tensor:
    """Into `out` the outputs, or what those of each panel are below. Returns the lengths of the rows of x."""
    rows, depth = x.shape
    count, threads = len(screen.numbers), threads_for(x.numel() * len(screen.scales) // 8)
    rounded, steps, lengths = torch.empty(rows, depth, dtype=torch.int16), x.new_empty(rows), x.new_empty(rows)
    _round_kernel()(
        threads_for(x.numel()), x.data_ptr(), x.stride(0), rows, depth, rounded.data_ptr(), steps.data_ptr(), lengths.data_ptr(),
        _input_steps(depth),
    )  # fmt: skip
    group = max(min(_GROUP, count // (8 * threads)), 1)
    _screen_kernel(whole)(
        threads, rounded.data_ptr(), rows, depth, screen.numbers.data_ptr(), count, screen.scales.data_ptr(), screen.bounds.data_ptr(),
        steps.data_ptr(), lengths.data_ptr(), out.data_ptr(), out.stride(0), group,
    )  # fmt: skip
    return lengths


@cache
def _round_kernel() -> Kernel:
    return build("round_rows", _emit_round)


def _emit_round(e: Emitter) -> None:
    """x [T, K] -> int16, a step and a length a row."""
    x, stride, rows, depth = e.pointer(0), e.argument(1), e.argument(2), e.argument(3)
    out, steps, lengths = e.pointer(4), e.pointer(5), e.pointer(6)
    most = e.b.uitofp(e.argument(7), F32)
    with e.shares(e.at(e.function.args[0], 8, I64), rows, 4) as (first, last), e.range(first, last) as row:
        line, target = e.at(x, e.mul(row, stride)), e.at(out, e.mul(row, depth), I16)
        largest, total = e.variable(e.splat(_TINY)), e.variable(e.splat(0.0))
        with e.range(0, depth, e.lanes) as column:
            largest.set(e.maximum(e.absolute(e.load_vector(line, column)), largest.get()))
        peak = e.reduce_max(largest.get())
        step = e.b.fdiv(peak, most)
        factor, limit = e.splat(e.b.fdiv(most, peak)), e.splat(most)
        with e.range(0, depth, e.lanes) as column:
            value = e.b.fmul(e.load_vector(line, column), factor)
            total.set(e.fma(value, value, total.get()))
            # What is not finite ends up within the limits as well; it is known by the row's length.
            e.store_int16(e.minimum(e.maximum(value, e.b.fneg(limit)), limit), target, column)
        e.store(step, steps, row)
        e.store(e.b.fmul(e.square_root(e.reduce_add(total.get())), step), lengths, row)


@cache
def _screen_kernel(whole: bool) -> Kernel:
    return build("screen", lambda e: _Screening(e, whole=whole).emit())


class _Screening:
    """Writes the kernel that says of each row and panel how high its outputs can be at most, or as a `whole` about what they are.

    Arguments: see `_multiply`.
    """

    def __init__(self, e: Emitter, *, whole: bool) -> None:
        self.e = e
        self.whole = whole
        self.x, self.rows, self.depth = e.pointer(0), e.argument(1), e.argument(2)
        self.numbers, self.panels, self.scales, self.bounds = e.pointer(3), e.argument(4), e.pointer(5), e.pointer(6)
        self.steps, self.lengths, self.out, self.out_stride = e.pointer(7), e.pointer(8), e.pointer(9), e.argument(10)
        self.group = e.argument(11)
        self.counter = e.at(e.function.args[0], 12, I64)
        self.width = 2 * e.lanes
        self.pairs = e.div(self.depth, 2)

    def emit(self) -> None:
        e = self.e
        with (
            e.shares_ahead(self.counter, self.panels, self.group) as (first, last, following),
            e.range(0, self.rows, _CACHED_ROWS) as top,
        ):
            rows = e.least(e.sub(self.rows, top), _CACHED_ROWS)
            with e.range(first, last) as panel:
                after = e.add(panel, 1)
                after = e.b.select(e.less(after, last), after, following)
                e.in_tiles(top, rows, range(1, most_rows() + 1), lambda count, row, *_: self._tile(count, row, panel, after))

    def _tile(self, count: int, row: ir.Value, panel: ir.Value, after: ir.Value) -> None:
        """`count` rows from `row` on times a panel, while the panel `after` is asked for."""
        e = self.e
        size = e.mul(self.depth, self.width)
        weights, wanted = (e.at(self.numbers, e.mul(number, size), I8) for number in (panel, after))
        lines = [e.at(self.x, e.mul(self.pairs, e.add(row, index)), I32) for index in range(count)]
        sums = [[e.variable(e.splat_i32(e.const(0))) for _ in range(2)] for _ in range(count)]
        even = e.mul(e.div(self.pairs, _UNROLL), _UNROLL)
        with e.range(0, even, _UNROLL) as pair:
            for asked in range(-(-2 * self.width * _UNROLL // _CACHE_LINE)):
                e.prefetch(e.at(wanted, e.add(e.mul(pair, 2 * self.width), asked * _CACHE_LINE), I8), e.const(0), near=False)
            for step in range(_UNROLL):
                self._multiply(sums, lines, weights, e.add(pair, step))
        with e.range(even, self.pairs) as pair:
            self._multiply(sums, lines, weights, pair)
        columns = [e.add(e.mul(panel, self.width), half * e.lanes) for half in (0, 1)]
        scales = [e.load_vector(self.scales, column) for column in columns]
        for index, pair_of_sums in enumerate(sums):
            step = e.splat(e.load(self.steps, e.add(row, index)))
            totals = [e.b.fmul(e.b.sitofp(total.get(), e.vector), step) for total in pair_of_sums]
            self._write(e.add(row, index), panel, columns, [e.b.fmul(*pair) for pair in zip(totals, scales, strict=True)])

    def _write(self, row: ir.Value, panel: ir.Value, columns: list[ir.Value], outputs: list[ir.Value]) -> None:
        e = self.e
        if self.whole:
            for column, output in zip(columns, outputs, strict=True):
                e.store(output, self.out, e.add(e.mul(row, self.out_stride), column))
            return
        length = e.splat(e.load(self.lengths, row))
        above = [e.fma(length, e.load_vector(self.bounds, column), output) for column, output in zip(columns, outputs, strict=True)]
        e.store(e.reduce_max(e.maximum(*above)), self.out, e.add(e.mul(row, self.out_stride), panel))

    def _multiply(self, sums: list[list[Variable]], lines: list[ir.Value], weights: ir.Value, pair: ir.Value) -> None:
        e = self.e
        columns = [e.load_int8_pairs(weights, e.add(e.mul(pair, 2 * self.width), half * 2 * e.lanes)) for half in (0, 1)]
        for line, row_sums in zip(lines, sums, strict=True):
            numbers = e.splat_int16_pair(line, pair)
            for column, total in zip(columns, row_sums, strict=True):
                total.set(e.b.add(total.get(), e.multiply_pairs(numbers, column)))


@cache
def _decide_kernel() -> Kernel:
    return build("decide", _emit_decide)


def _emit_decide(e: Emitter) -> None:
    """Of each row the panel that promises most, then all that promise as much as the highest output so far."""
    x, stride, rows, depth = e.pointer(0), e.argument(1), e.argument(2), e.argument(3)
    panels, columns, highest, high_stride = e.pointer(4), e.argument(5), e.pointer(6), e.argument(7)
    lengths, values, places = e.pointer(8), e.pointer(9), e.pointer(10)
    found = e.scratch(2 * e.lanes)
    count = e.div(e.add(columns, 2 * e.lanes - 1), 2 * e.lanes)
    with e.shares(e.at(e.function.args[0], 11, I64), rows, 1) as (row, _):
        line, promises = e.at(x, e.mul(row, stride)), e.at(highest, e.mul(row, high_stride))
        length = e.load(lengths, row)
        nothing = e.b.fmul(length, e.scalar(0.0))  # NaN where the row is not finite
        best, place = e.variable(e.scalar(float("-inf"))), e.variable(e.const(0))
        with e.when(e.b.fcmp_ordered("==", nothing, nothing)):
            top = e.variable(e.splat(float("-inf")))
            with e.range(0, count, e.lanes) as panel:
                top.set(e.maximum(e.load_vector(promises, panel), top.get()))
            most = e.reduce_max(top.get())
            with e.range(0, 2) as sweep, e.range(0, count, e.lanes) as start:
                bar = e.b.select(e.equal(sweep, 0), most, best.get())
                some = e.any(e.b.fcmp_ordered(">=", e.load_vector(promises, start), e.splat(bar)))
                with (
                    e.when(some),
                    e.range(start, e.least(e.add(start, e.lanes), count)) as panel,
                    e.when(e.b.fcmp_ordered(">=", e.load(promises, panel), bar)),
                ):
                    _outputs(e, line, panels, panel, depth, found)
                    first = e.mul(panel, 2 * e.lanes)
                    with e.range(0, e.least(e.sub(columns, first), 2 * e.lanes)) as column:
                        keep_first(e, best, place, e.load(found, column), e.add(first, column))
        e.store(e.b.fadd(best.get(), nothing), values, row)
        e.b.store(place.get(), e.at(places, row, I64))


def _outputs(e: Emitter, line: ir.Value, panels: ir.Value, panel: ir.Value, depth: ir.Value, out: ir.Value) -> None:
    """A row times a panel, into `out` [width]: one running sum over K in order, as in `kernels.native.linear`."""
    width = 2 * e.lanes
    weights = e.at(panels, e.mul(panel, e.mul(depth, width)))
    sums = [e.variable(e.splat(0.0)) for _ in range(2)]
    with e.range(0, depth) as k:
        number = e.splat(e.load(line, k))
        for half, total in enumerate(sums):
            total.set(e.fma(number, e.load_vector(weights, e.add(e.mul(k, width), half * e.lanes)), total.get()))
    for half, total in enumerate(sums):
        e.store(total.get(), out, half * e.lanes)
