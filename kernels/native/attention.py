"""Paged, variable-length attention with grouped heads, in float32, over the jobs of `kernels.native.attention_plan`.

Keys lie transposed inside their blocks, [head_dim][block], so that scores of 16 keys are sums over head_dim of a broadcast query times
two vectors of keys: no sums across lanes. A job's lines (its rows times the query heads of one key head) go in tiles of up to 6, as in
`kernels.native.linear`.

The softmax runs over chunks of `CHUNK` keys that start at multiples of `CHUNK`, merged in order (online softmax, Milakov and
Gimelshein, arXiv 1805.02867). Where chunks begin does not depend on who shares the step, nor does it matter whether a chunk is read for
one sequence or once for all that share it: every row's result is the same to the last bit in any batch.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import TYPE_CHECKING

import torch
from llvmlite import ir

from kernels.native.attention_plan import CHUNK, FINISH, KEYS, MOST_HEAD_DIM, MOST_LINES, RESUME
from kernels.native.emit import I64
from kernels.native.jit import Kernel, build, threads_for
from kernels.native.program import Call
from kernels.native.rows import float_bits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kernels.native.attention_plan import NativePlan
    from kernels.native.emit import Emitter, Variable

_TILE = 6
_JOBS = 8
"""Jobs a thread from which on it takes all key heads of one, which lie side by side in memory: 64 sequences of 150 to 280 tokens then take
0.81 to 0.83 of the time (AMD Zen 3). With fewer jobs threads would not end together.
"""
_SMALLEST = float("-inf")


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: NativePlan, scale: float, soft_cap: float | None = None
) -> torch.Tensor:
    """See `kernels.reference.attention`. q: float32 [T, heads, head_dim], heads contiguous in a row; keys: transposed blocks."""
    out = torch.empty(q.shape, dtype=q.dtype)
    for jobs in plan.waves:
        call(q, out, keys, values, plan, jobs, scale, soft_cap).run()
    return out


CHANGING = (*range(5, 13), 19)
"""Arguments of `call` that go with the step, not with the layer."""


def call(
    q: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: NativePlan,
    jobs: NDArray[np.int64],
    scale: float,
    soft_cap: float | None,
) -> Call:
    """One wave of `plan`, into `out` [T, heads, head_dim], contiguous."""
    _, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    arguments = (
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        plan.tables.ctypes.data,
        plan.tables.shape[1],
        jobs.ctypes.data,
        len(jobs),
        plan.rows.ctypes.data,
        plan.visible_from.ctypes.data,
        plan.visible_to.ctypes.data,
        plan.state.data_ptr(),
        float_bits(scale),
        float_bits(soft_cap or 0.0),
        heads // kv_heads,
        kv_heads,
        head_dim,
        block_size,
        kv_heads if len(jobs) >= _JOBS * torch.get_num_threads() else 1,
    )
    return Call(_kernel(soft_cap is not None), threads_for(plan.work * heads * head_dim // 4), arguments)


@cache
def _kernel(capped: bool) -> Kernel:
    return build("attention", lambda e: _Attention(e, capped).emit())


class _Attention:
    """Writes the kernel. Arguments: see `attention`; the one after them counts the items (job, key head) that were handed out."""

    def __init__(self, e: Emitter, capped: bool) -> None:
        self.e = e
        self.capped = capped
        self.vectors = KEYS // e.lanes
        self.q, self.q_stride, self.out, self.keys, self.values = e.pointer(0), e.argument(1), e.pointer(2), e.pointer(3), e.pointer(4)
        self.tables, self.table_width, self.jobs, self.num_jobs = e.pointer(5), e.argument(6), e.pointer(7), e.argument(8)
        self.rows, self.visible_from, self.visible_to = e.pointer(9), e.pointer(10), e.pointer(11)
        self.state, self.scale, self.cap = e.pointer(12), e.argument_float(13), e.argument_float(14)
        self.group, self.kv_heads, self.head_dim, self.block_size = (e.argument(index) for index in range(15, 19))
        self.at_once = e.argument(19)
        self.counter = e.at(e.function.args[0], 20, I64)
        # Of each line of the job: scaled query, unnormalised output, highest score, sum of weights, what it sees.
        self.lines, self.sums = e.scratch(MOST_LINES * MOST_HEAD_DIM), e.scratch(MOST_LINES * MOST_HEAD_DIM)
        self.peaks, self.totals = e.scratch(MOST_LINES), e.scratch(MOST_LINES)
        self.low, self.high = e.scratch_integers(MOST_LINES), e.scratch_integers(MOST_LINES)
        self.scores = e.scratch(_TILE * CHUNK)
        # Where the keys and the values of each 16 tokens of the chunk begin, and those of the chunk after it.
        blocks = [e.scratch_integers(CHUNK // KEYS) for _ in range(4)]
        self.key_blocks, self.value_blocks, self.next_key_blocks, self.next_value_blocks = blocks

    def emit(self) -> None:
        e = self.e
        items = e.mul(self.num_jobs, self.kv_heads)
        self.asked = e.variable(ir.Constant(ir.IntType(1), 0))  # whether memory was asked for all values of the chunk
        with (
            e.shares_ahead(self.counter, items, self.at_once) as (first, stop, following),
            e.range(first, stop) as item,
        ):
            after_this = e.add(item, 1)
            following = e.b.select(e.less(after_this, stop), after_this, following)
            job, self.kv_head = self._job_of(item)
            first_row, num_rows, table, first_chunk, last_chunk, self.flags = (e.load_i64(job, field) for field in range(6))
            count = e.mul(num_rows, self.group)
            top = e.variable(e.const(0))
            with e.range(0, count) as line:
                self._begin(line, first_row, top)
            table_row = e.mul(table, self.table_width)
            last = e.least(last_chunk, e.div(e.add(top.get(), CHUNK - 1), CHUNK))
            after = self._first_chunk_of(e.least(following, e.sub(items, 1)))
            self.tiles = e.div(e.add(count, _TILE - 1), _TILE)
            with e.range(first_chunk, last) as chunk:
                start = e.mul(chunk, CHUNK)
                num_keys = e.least(e.sub(top.get(), start), CHUNK)
                self._find_blocks(table_row, self.kv_head, start, num_keys, self.key_blocks, self.value_blocks)
                more = e.less(e.add(chunk, 1), last)
                own = (table_row, self.kv_head, e.add(start, CHUNK), e.least(e.sub(top.get(), e.add(start, CHUNK)), CHUNK))
                next_row, next_head, next_start, next_seen = (e.b.select(more, *pair) for pair in zip(own, after, strict=True))
                self._find_blocks(next_row, next_head, next_start, next_seen, self.next_key_blocks, self.next_value_blocks)
                whole = e.mul(e.div(count, _TILE), _TILE)
                with e.range(0, whole, _TILE) as line:
                    self._tile(_TILE, line, start, num_keys)
                for rest in range(1, _TILE):
                    with e.when(e.equal(e.sub(count, whole), rest)):
                        self._tile(rest, whole, start, num_keys)
                self.asked.set(e.b.and_(e.less(e.const(1), self.tiles), e.equal(num_keys, CHUNK)))
            with e.range(0, count) as line:
                self._end(line, first_row)

    def _job_of(self, item: ir.Value) -> tuple[ir.Value, ir.Value]:
        """A job and a key head."""
        e = self.e
        return e.at(self.jobs, e.mul(e.div(item, self.kv_heads), 6), I64), e.b.urem(item, self.kv_heads)

    def _first_chunk_of(self, item: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """What `_find_blocks` wants to know of the first chunk of an item, going by the last of its rows, which sees most."""
        e = self.e
        job, kv_head = self._job_of(item)
        first_row, num_rows, table, first_chunk = (e.load_i64(job, field) for field in range(4))
        row = e.load_i32(self.rows, e.sub(e.add(first_row, num_rows), 1))
        start = e.mul(first_chunk, CHUNK)
        return e.mul(table, self.table_width), kv_head, start, e.least(e.sub(e.load_i64(self.visible_to, row), start), CHUNK)

    def _place(self, line: ir.Value, first_row: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The packed row and the query head of a line."""
        e = self.e
        row = e.load_i32(self.rows, e.add(first_row, e.div(line, self.group)))
        return row, e.add(e.mul(self.kv_head, self.group), e.b.urem(line, self.group))

    def _state_of(self, row: ir.Value, head: ir.Value) -> tuple[ir.Value, ir.Value]:
        e = self.e
        index = e.add(e.mul(row, e.mul(self.group, self.kv_heads)), head)
        return e.at(self.state, e.mul(index, 2)), e.at(self.out, e.mul(index, self.head_dim))

    def _begin(self, line: ir.Value, first_row: ir.Value, top: Variable) -> None:
        e = self.e
        row, head = self._place(line, first_row)
        source = e.at(self.q, e.add(e.mul(row, self.q_stride), e.mul(head, self.head_dim)))
        at = e.mul(line, self.head_dim)
        factor = e.splat(self.scale)
        state, out = self._state_of(row, head)
        with e.b.if_else(self._flag(RESUME)) as (resumed, fresh):
            with resumed:
                e.store(e.load(state, 0), self.peaks, line)
                e.store(e.load(state, 1), self.totals, line)
                with e.range(0, self.head_dim, e.lanes) as column:
                    e.store(e.load_vector(out, column), self.sums, e.add(at, column))
            with fresh:
                e.store(e.scalar(_SMALLEST), self.peaks, line)
                e.store(e.scalar(0.0), self.totals, line)
                with e.range(0, self.head_dim, e.lanes) as column:
                    e.store(e.splat(0.0), self.sums, e.add(at, column))
        with e.range(0, self.head_dim, e.lanes) as column:
            e.store(e.b.fmul(e.load_vector(source, column), factor), self.lines, e.add(at, column))
        high = e.load_i64(self.visible_to, row)
        e.b.store(e.load_i64(self.visible_from, row), e.at(self.low, line, I64))
        e.b.store(high, e.at(self.high, line, I64))
        top.set(e.most(top.get(), high))

    def _end(self, line: ir.Value, first_row: ir.Value) -> None:
        e = self.e
        row, head = self._place(line, first_row)
        state, out = self._state_of(row, head)
        total = e.load(self.totals, line)
        finish = self._flag(FINISH)
        factor = e.splat(e.b.select(finish, e.b.fdiv(e.scalar(1.0), total), e.scalar(1.0)))
        with e.range(0, self.head_dim, e.lanes) as column:
            e.store(e.b.fmul(e.load_vector(self.sums, e.add(e.mul(line, self.head_dim), column)), factor), out, column)
        with e.when(e.b.not_(finish)):
            e.store(e.load(self.peaks, line), state, 0)
            e.store(total, state, 1)

    def _flag(self, bit: int) -> ir.Value:
        return self.e.b.icmp_signed("!=", self.e.b.and_(self.flags, self.e.const(bit)), self.e.const(0))

    def _find_blocks(
        self, table_row: ir.Value, kv_head: ir.Value, start: ir.Value, num_keys: ir.Value, keys: ir.Value, values: ir.Value
    ) -> None:
        """Fills `keys` and `values`, in cache elements; past the last token they repeat its block."""
        e = self.e
        last = e.sub(num_keys, 1)
        with e.range(0, CHUNK, KEYS) as key:
            position = e.add(start, e.mul(e.div(e.least(key, last), KEYS), KEYS))
            block = e.load_i32(self.tables, e.add(table_row, e.div(position, self.block_size)))
            base = e.mul(e.add(e.mul(block, self.kv_heads), kv_head), e.mul(self.head_dim, self.block_size))
            inside = e.b.urem(position, self.block_size)
            index = e.div(key, KEYS)
            e.b.store(e.add(base, inside), e.at(keys, index, I64))
            e.b.store(e.add(base, e.mul(inside, self.head_dim)), e.at(values, index, I64))

    def _block_at(self, cache: ir.Value, blocks: ir.Value, key: ir.Value) -> ir.Value:
        """Keys or values of the 16 tokens that begin at `key` of the chunk."""
        return self.e.at(cache, self.e.load_i64(blocks, self.e.div(key, KEYS)))

    def _parts(self, tile: ir.Value, tiles: ir.Value, count: int | ir.Value) -> tuple[tuple[ir.Value, ir.Value, bool], ...]:
        """`count` turns of a loop as (from, to, whether to ask memory for what comes): `tiles` divide the asking among them."""
        e = self.e
        low, high = (e.div(e.mul(number, count), tiles) for number in (tile, e.add(tile, 1)))
        return (e.const(0), low, False), (low, high, True), (high, e.integer(count), False)

    def _tile(self, count: int, line: ir.Value, start: ir.Value, num_keys: ir.Value) -> None:
        e = self.e
        index = [e.add(line, number) for number in range(count)]
        queries = [e.at(self.lines, e.mul(number, self.head_dim)) for number in index]
        peaks = [e.variable(e.splat(_SMALLEST)) for _ in range(count)]
        # Where registers allow, twice the keys or columns at once: as many independent sums as the multipliers' latency asks for.
        at_once = 2 if count * self.vectors <= _TILE else 1
        bounds = [[e.load_i64(bound, number) for number in index] for bound in (self.low, self.high)]
        all_from, all_to, any_to = reduce(e.most, bounds[0]), reduce(e.least, bounds[1]), reduce(e.most, bounds[1])
        num_keys = e.least(num_keys, e.sub(any_to, start))
        with e.range(0, num_keys, KEYS * at_once) as key:
            position = e.add(start, key)
            clear = e.b.and_(e.less(e.sub(all_from, 1), position), e.less(e.add(position, KEYS * at_once - 1), all_to))
            self._score(index, queries, peaks, key, position, at_once, clear)
        shrinks = self._weigh(index, peaks, num_keys)
        paired = e.mul(e.div(self.head_dim, KEYS * at_once), KEYS * at_once)
        with e.range(0, paired, KEYS * at_once) as column:
            self._gather(index, shrinks, column, num_keys, at_once)
        if at_once > 1:
            with e.range(paired, self.head_dim, KEYS) as column:
                self._gather(index, shrinks, column, num_keys, 1)

    def _score(
        self,
        index: list[ir.Value],
        queries: list[ir.Value],
        peaks: list[Variable],
        key: ir.Value,
        position: ir.Value,
        at_once: int,
        clear: ir.Value,
    ) -> None:
        """Scores of 16 keys or 32, and the highest so far in each lane. clear: whether every line sees them all."""
        e = self.e
        steps = [e.add(key, number * KEYS) for number in range(at_once)]
        blocks = [self._block_at(self.keys, self.key_blocks, step) for step in steps]
        # Blocks lie anywhere, so the processor cannot guess the next ones. While scores are made values are asked for, and keys while
        # values are gathered, so that memory has work all along. The first tile asks for the values of these keys, the others each for
        # their part of the next chunk's; where that was done for this chunk, the first does as the others do.
        tile, alone = e.div(index[0], _TILE), e.b.select(self.asked.get(), e.const(0), e.const(1))
        own = e.less(tile, alone)
        wanted = e.b.select(own, self.value_blocks, self.next_value_blocks)
        values = [self._block_at(self.values, wanted, step) for step in steps]
        place = e.b.select(own, tile, e.sub(tile, alone))
        tiles = e.b.select(own, e.const(1), e.sub(self.tiles, alone))
        sums = [[e.variable(e.splat(0.0)) for _ in range(self.vectors * at_once)] for _ in queries]
        for begin, end, asks in self._parts(place, tiles, self.head_dim):
            with e.range(begin, end) as column:
                row = e.mul(column, self.block_size)
                for block in values if asks else ():
                    e.prefetch(block, e.mul(column, KEYS))
                keys = [e.load_vector(block, e.add(row, half * e.lanes)) for block in blocks for half in range(self.vectors)]
                for query, row_sums in zip(queries, sums, strict=True):
                    number = e.splat(e.load(query, column))
                    for vector, total in zip(keys, row_sums, strict=True):
                        total.set(e.fma(number, vector, total.get()))
        scores = [[self._capped(total.get()) for total in row_sums] for row_sums in sums]
        with e.b.if_else(clear) as (seen, partly):
            with seen:
                self._keep(scores, peaks, key)
            with partly:
                numbers = [e.lane_numbers(e.add(position, half * e.lanes)) for half in range(self.vectors * at_once)]
                for line, row_scores in zip(index, scores, strict=True):
                    low, high = (e.load_i64(bound, line) for bound in (self.low, self.high))
                    for half, score in enumerate(row_scores):
                        row_scores[half] = e.b.select(e.between(numbers[half], low, high), score, e.splat(_SMALLEST))
                self._keep(scores, peaks, key)

    def _keep(self, scores: list[list[ir.Value]], peaks: list[Variable], key: ir.Value) -> None:
        e = self.e
        for place, (row_scores, peak) in enumerate(zip(scores, peaks, strict=True)):
            for half, score in enumerate(row_scores):
                e.store(score, self.scores, e.add(key, place * CHUNK + half * e.lanes))
                peak.set(e.maximum(peak.get(), score))

    def _capped(self, score: ir.Value) -> ir.Value:
        """cap * tanh(score / cap), with tanh(u) = 1 - 2 / (exp(2 u) + 1)."""
        if not self.capped:
            return score
        e = self.e
        cap = e.splat(self.cap)
        twice = e.minimum(e.b.fdiv(e.b.fmul(score, e.splat(2.0)), cap), e.splat(80.0))
        return e.b.fmul(cap, e.b.fsub(e.splat(1.0), e.b.fdiv(e.splat(2.0), e.b.fadd(e.exp(twice), e.splat(1.0)))))

    def _weigh(self, index: list[ir.Value], peaks: list[Variable], num_keys: ir.Value) -> list[ir.Value]:
        """Scores to weights, in place. Returns the factors that what was summed before shrinks by.

        A line's steps wait for each other (its highest score, the exponentials, their sum), so all lines take each step together.
        """
        e = self.e
        before = [e.load(self.peaks, line) for line in index]
        highest = [e.maximum(old, e.reduce_max(peak.get())) for old, peak in zip(before, peaks, strict=True)]
        # A line that sees nothing of this chunk or any before it has no finite score.
        unseen = [e.b.fcmp_ordered("==", peak, e.scalar(_SMALLEST)) for peak in highest]
        anchors = [e.b.select(nothing, e.scalar(0.0), peak) for nothing, peak in zip(unseen, highest, strict=True)]
        totals = [e.variable(e.splat(0.0)) for _ in index]
        with e.range(0, num_keys, e.lanes) as key:
            for place, (anchor, total) in enumerate(zip(anchors, totals, strict=True)):
                at = e.add(key, place * CHUNK)
                weight = e.exp(e.b.fsub(e.load_vector(self.scores, at), e.splat(anchor)))
                e.store(weight, self.scores, at)
                total.set(e.b.fadd(total.get(), weight))
        shrinks = [e.extract(e.exp(e.splat(e.b.fsub(old, anchor)))) for old, anchor in zip(before, anchors, strict=True)]
        for line, peak, shrink, total in zip(index, highest, shrinks, totals, strict=True):
            e.store(peak, self.peaks, line)
            e.store(e.fma(e.load(self.totals, line), shrink, e.reduce_add(total.get())), self.totals, line)
        return shrinks

    def _gather(self, index: list[ir.Value], shrinks: list[ir.Value], column: ir.Value, num_keys: ir.Value, at_once: int) -> None:
        """Adds the weighted values of 16 columns or 32 to the lines' sums."""
        e = self.e
        vectors = range(self.vectors * at_once)
        places = [e.at(self.sums, e.add(e.mul(line, self.head_dim), column)) for line in index]
        sums = [
            [e.variable(e.b.fmul(e.load_vector(place, half * e.lanes), e.splat(shrink))) for half in vectors]
            for place, shrink in zip(places, shrinks, strict=True)
        ]
        with e.range(0, num_keys, KEYS) as key:
            values = e.at(self._block_at(self.values, self.value_blocks, key), column)
            next_keys = self._block_at(self.keys, self.next_key_blocks, key)

            def add(begin: ir.Value, end: ir.Value, *, asks: bool) -> None:
                with e.range(begin, end) as number:
                    for line in range(at_once if asks else 0):  # over all columns, every line of the block once
                        asked = e.add(e.add(column, e.mul(number, at_once)), line)
                        e.prefetch(next_keys, e.mul(asked, self.block_size), near=False)
                    loaded = [e.load_vector(values, e.add(e.mul(number, self.head_dim), half * e.lanes)) for half in vectors]
                    for place, row_sums in enumerate(sums):
                        weight = e.splat(e.load(self.scores, e.add(e.add(key, number), place * CHUNK)))
                        for vector, total in zip(loaded, row_sums, strict=True):
                            total.set(e.fma(weight, vector, total.get()))

            # Past the last key that any line sees lies what earlier owners of the block left: not even times zero.
            seen = e.least(e.sub(num_keys, key), KEYS)
            with e.b.if_else(e.equal(self.tiles, 1)) as (alone, together):
                with alone:
                    add(e.const(0), seen, asks=True)
                with together:
                    for begin, end, asks in self._parts(e.div(index[0], _TILE), self.tiles, KEYS):
                        add(begin, e.least(seen, end), asks=asks)
        for place, row_sums in zip(places, sums, strict=True):
            for half, total in enumerate(row_sums):
                e.store(total.get(), place, half * e.lanes)
