"""What happens to single rows between the products: normalisation, rotation of queries and keys on their way into the cache, and at last
the choice of the likeliest token."""

from __future__ import annotations

import struct
from functools import cache
from typing import TYPE_CHECKING

import torch

from kernels.native.emit import I64
from kernels.native.jit import Kernel, build, threads_for
from kernels.native.program import Call

if TYPE_CHECKING:
    from llvmlite import ir

    from kernels.native.emit import Emitter, Variable

_ROWS_AT_ONCE = 4
_SUMS_AT_ONCE = 4
_MOST_KEYS_AT_ONCE = 16
"""Rows of one sequence write into the same cache lines, side by side: they are to be one thread's."""


def float_bits(value: float) -> int:
    """A float32 as the integer that a kernel's `argument_float` takes."""
    return int.from_bytes(struct.pack("<f", value), "little")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.reference.rms_norm`. x: float32 [..., N], rows contiguous; N a multiple of the vector's lanes."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(x.shape)
    norm_call(rows, weight, out, eps).run()
    return out


NORM_CHANGING = (2,)
"""Arguments of `norm_call` that go with the number of rows alone."""


def norm_call(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> Call:
    """The norm of x [T, N] into contiguous `out`."""
    rows, columns = x.shape
    arguments = (x.data_ptr(), x.stride(0), rows, columns, weight.data_ptr(), out.data_ptr(), float_bits(eps))
    return Call(_norm_kernel(), threads_for(x.numel()), arguments)


def rotary_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """See `kernels.reference.rotary_kv_write`. Works in place: the queries are a view of `qkv`. keys: transposed blocks."""
    _, kv_heads, _, head_dim = keys.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    for first, last, weight in ((0, num_heads, q_norm), (num_heads, num_heads + kv_heads, k_norm)):
        if weight is not None:
            part = heads[:, first:last]
            part.copy_(rms_norm(part, weight, eps))
    rotation_call(qkv, cos, sin, slots, keys, values, num_heads=num_heads).run()
    return qkv[:, : num_heads * head_dim].view(len(qkv), num_heads, head_dim)


ROTATION_CHANGING = (2, 3, 4, 5, 12, 13)
"""Arguments of `rotation_call` that go with the step, not with the layer."""


def rotation_call(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_heads: int,
) -> Call:
    """The rotation in place, and the writes into the cache."""
    _, kv_heads, block_size, head_dim = keys.shape
    rotated = 0 if cos is None else cos.shape[1]
    threads = threads_for(qkv.numel())
    arguments = (
        qkv.data_ptr(),
        qkv.stride(0),
        len(qkv),
        0 if cos is None else cos.data_ptr(),
        0 if sin is None else sin.data_ptr(),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        num_heads,
        kv_heads,
        head_dim,
        block_size,
        rotated,
        min(-(-len(qkv) // threads), _MOST_KEYS_AT_ONCE),
    )
    return Call(_rotate_kernel(), threads, arguments)


@cache
def _norm_kernel() -> Kernel:
    return build("rms_norm", _emit_norm)


def _emit_norm(e: Emitter) -> None:
    x, x_stride, rows, columns = e.pointer(0), e.argument(1), e.argument(2), e.argument(3)
    weight, out, eps = e.pointer(4), e.pointer(5), e.argument_float(6)
    width = e.b.uitofp(columns, eps.type)
    with e.shares(e.at(e.function.args[0], 7, I64), rows, _ROWS_AT_ONCE) as (first, last), e.range(first, last) as row:
        line, target = e.at(x, e.mul(row, x_stride)), e.at(out, e.mul(row, columns))
        total = e.variable(e.splat(0.0))
        with e.range(0, columns, e.lanes) as column:
            value = e.load_vector(line, column)
            total.set(e.fma(value, value, total.get()))
        mean = e.b.fdiv(e.reduce_add(total.get()), width)
        root = e.square_root(e.b.fadd(mean, eps))
        factor = e.splat(e.b.fdiv(e.scalar(1.0), root))
        with e.range(0, columns, e.lanes) as column:
            e.store(e.b.fmul(e.b.fmul(e.load_vector(line, column), factor), e.load_vector(weight, column)), target, column)


@cache
def _rotate_kernel() -> Kernel:
    return build("rotate_and_write", _emit_rotate)


def _emit_rotate(e: Emitter) -> None:
    qkv, stride, rows = e.pointer(0), e.argument(1), e.argument(2)
    cos, sin, slots, keys, values = e.pointer(3), e.pointer(4), e.pointer(5), e.pointer(6), e.pointer(7)
    num_heads, kv_heads, head_dim, block_size, rotated, at_once = (e.argument(index) for index in range(8, 14))

    def place_of(row: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Key heads that the row writes (none where its slot is negative: it is kept nowhere), its block's place, its place inside."""
        slot = e.load_i64(slots, row)
        kept = e.b.select(e.less(slot, 0), e.const(0), kv_heads)
        return kept, e.mul(e.div(slot, block_size), e.mul(kv_heads, e.mul(head_dim, block_size))), e.b.urem(slot, block_size)

    with e.shares(e.at(e.function.args[0], 14, I64), rows, at_once) as (first, last):
        with e.range(first, last) as row:
            # A token's keys lie one cache line apart: they are all asked for at once, and come while the heads turn.
            kept, block, offset = place_of(row)
            with e.range(0, e.mul(kept, head_dim)) as line:
                e.prefetch(keys, e.add(e.add(block, e.mul(line, block_size)), offset), near=False, write=True)
            line = e.at(qkv, e.mul(row, stride))
            turn = (e.at(cos, e.mul(row, rotated)), e.at(sin, e.mul(row, rotated)))
            with e.range(0, e.add(num_heads, kv_heads)) as head:
                _rotate(e, e.at(line, e.mul(head, head_dim)), turn, e.div(rotated, 2))
        with e.range(first, last) as row:
            kept, block, offset = place_of(row)
            line = e.at(qkv, e.mul(row, stride))
            with e.range(0, kept) as head:
                place = e.add(block, e.mul(head, e.mul(head_dim, block_size)))
                key = e.at(line, e.mul(e.add(head, num_heads), head_dim))
                value = e.at(line, e.mul(e.add(head, e.add(num_heads, kv_heads)), head_dim))
                with e.range(0, head_dim) as column:
                    e.store(e.load(key, column), keys, e.add(e.add(place, e.mul(column, block_size)), offset))
                target = e.at(values, e.add(place, e.mul(offset, head_dim)))
                with e.range(0, head_dim, e.lanes) as column:
                    e.store(e.load_vector(value, column), target, column)


def _rotate(e: Emitter, head: ir.Value, turn: tuple[ir.Value, ir.Value], half: ir.Value) -> None:
    """x * cos + roll(x, half) * sin over the first 2 * half numbers, in place; `sin` as `kernels.reference.rotary` takes it."""
    cos, sin = turn
    with e.range(0, half, e.lanes) as column:
        other = e.add(column, half)
        low, high = e.load_vector(head, column), e.load_vector(head, other)
        for at, value, partner in ((column, low, high), (other, high, low)):
            turned = e.fma(partner, e.load_vector(sin, at), e.b.fmul(value, e.load_vector(cos, at)))
            e.store(turned, head, at)


def peaks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest number of each row of x, float32 [T, N] with rows contiguous, and where it stands first: float32 [T], int64 [T].

    A row with a NaN has the peak NaN, wherever it is said to stand.
    """
    values, places = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    rows, columns = x.shape
    _peaks_kernel()(threads_for(x.numel()), x.data_ptr(), x.stride(0), rows, columns, values.data_ptr(), places.data_ptr())
    return values, places


@cache
def _peaks_kernel() -> Kernel:
    return build("peaks", _emit_peaks)


def _emit_peaks(e: Emitter) -> None:
    """Each lane keeps its highest number and when it came first; rows are worked off one by one, by whoever is free."""
    x, stride, rows, columns = e.pointer(0), e.argument(1), e.argument(2), e.argument(3)
    values, places = e.pointer(4), e.pointer(5)
    highs, turns = e.scratch(e.lanes), e.scratch_int32(e.lanes)
    whole = e.sub(columns, e.b.urem(columns, e.const(e.lanes)))
    with e.shares(e.at(e.function.args[0], 6, I64), rows, 1) as (row, _):
        line = e.at(x, e.mul(row, stride))
        high, wrong = e.variable(e.splat(float("-inf"))), e.variable(e.splat(0.0))
        turn = e.variable(e.splat_i32(e.const(0)))
        with e.range(0, whole, e.lanes) as column:
            value = e.load_vector(line, column)
            higher = e.b.fcmp_ordered(">", value, high.get())
            high.set(e.b.select(higher, value, high.get()))
            turn.set(e.b.select(higher, e.splat_i32(column), turn.get()))
            wrong.set(e.b.select(e.b.fcmp_unordered("uno", value, value), value, wrong.get()))
        e.store(high.get(), highs, 0)
        e.b.store(turn.get(), turns, align=4)
        best, place = e.variable(e.scalar(float("-inf"))), e.variable(e.const(0))
        bad = e.variable(e.reduce_add(wrong.get()))
        with e.range(0, e.lanes) as lane:
            keep_first(e, best, place, e.load(highs, lane), e.add(e.load_i32(turns, lane), lane))
        with e.range(whole, columns) as column:
            value = e.load(line, column)
            keep_first(e, best, place, value, column)
            bad.set(e.b.fadd(bad.get(), e.b.select(e.b.fcmp_unordered("uno", value, value), value, e.scalar(0.0))))
        e.store(e.b.fadd(best.get(), bad.get()), values, row)
        e.b.store(place.get(), e.at(places, row, I64))


def keep_first(e: Emitter, best: Variable, place: Variable, value: ir.Value, column: ir.Value) -> None:
    """The higher number, of equal ones the first."""
    level = e.b.and_(e.b.fcmp_ordered("==", value, best.get()), e.less(column, place.get()))
    better = e.b.or_(e.b.fcmp_ordered(">", value, best.get()), level)
    best.set(e.b.select(better, value, best.get()))
    place.set(e.b.select(better, column, place.get()))


def log_sums(x: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
    """log sum exp of each row of x, float32 [T, N] with rows contiguous, N whole vectors, given its highest number: float32 [T]."""
    sums = x.new_empty(len(x))
    rows, columns = x.shape
    _sums_kernel()(threads_for(x.numel()), x.data_ptr(), x.stride(0), rows, columns, peaks.data_ptr(), sums.data_ptr())
    return sums.log_().add_(peaks)


@cache
def _sums_kernel() -> Kernel:
    return build("exponentials", _emit_sums)


def _emit_sums(e: Emitter) -> None:
    """Several sums at once, so that one does not wait for the other."""
    x, stride, rows, columns, peaks, sums = e.pointer(0), e.argument(1), e.argument(2), e.argument(3), e.pointer(4), e.pointer(5)
    step = _SUMS_AT_ONCE * e.lanes
    whole = e.mul(e.div(columns, step), step)
    with e.shares(e.at(e.function.args[0], 6, I64), rows, 1) as (row, _):
        line, level = e.at(x, e.mul(row, stride)), e.splat(e.load(peaks, row))
        totals = [e.variable(e.splat(0.0)) for _ in range(_SUMS_AT_ONCE)]
        with e.range(0, whole, step) as column:
            for index, total in enumerate(totals):
                value = e.load_vector(line, e.add(column, index * e.lanes))
                total.set(e.b.fadd(total.get(), e.exp(e.b.fsub(value, level))))
        with e.range(whole, columns, e.lanes) as column:
            totals[0].set(e.b.fadd(totals[0].get(), e.exp(e.b.fsub(e.load_vector(line, column), level))))
        total = totals[0].get()
        for other in totals[1:]:
            total = e.b.fadd(total, other.get())
        e.store(e.reduce_add(total), sums, row)
