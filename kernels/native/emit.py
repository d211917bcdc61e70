"""A small vocabulary over llvmlite for writing vector kernels: integers, pointers, vectors, mutable variables and counted loops.

Mutable variables and loop counters are stack slots; LLVM's `mem2reg` turns them into registers. What is unrolled is unrolled by Python.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from llvmlite import ir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
PTR = ir.PointerType()
_MOST_POINTERS = 6
"""Of `Emitter.apart`: x86 has 16 registers for integers, and loops count and read other things as well."""


class Variable:
    """A mutable value."""

    def __init__(self, builder: ir.IRBuilder, slot: ir.Value, kind: ir.Type) -> None:
        self._builder = builder
        self._slot = slot
        self._kind = kind

    def get(self) -> ir.Value:
        return self._builder.load(self._slot, typ=self._kind)

    def set(self, value: ir.Value) -> None:
        self._builder.store(value, self._slot)


class Emitter:
    """Builds one function `void name(int64 *arguments)`. `lanes`: float32 numbers in a vector register of the machine, whose
    instructions for smaller integers may be narrower than that (`wide_integers` says that they are not).
    """

    def __init__(self, module: ir.Module, name: str, lanes: int, *, wide_integers: bool) -> None:
        self.module = module
        self.lanes = lanes
        self.wide_integers = wide_integers
        self.vector = ir.VectorType(F32, lanes)
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR]), name)
        self._entry = self.function.append_basic_block("entry")
        body = self.function.append_basic_block("body")
        self._slots = ir.IRBuilder(self._entry)
        self.b = ir.IRBuilder(body)
        self._body = body

    def finish(self) -> None:
        self.b.ret_void()
        self._slots.branch(self._body)

    # Numbers.

    def const(self, value: int) -> ir.Value:
        return ir.Constant(I64, value)

    def integer(self, value: int | ir.Value) -> ir.Value:
        return self.const(value) if isinstance(value, int) else value

    def add(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        return self.b.add(a, self.integer(b))

    def sub(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        return self.b.sub(a, self.integer(b))

    def mul(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        return self.b.mul(a, self.integer(b))

    def div(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        return self.b.udiv(a, self.integer(b))

    def least(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        other = self.integer(b)
        return self.b.select(self.b.icmp_signed("<", a, other), a, other)

    def most(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        other = self.integer(b)
        return self.b.select(self.b.icmp_signed(">", a, other), a, other)

    def less(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        return self.b.icmp_signed("<", a, self.integer(b))

    def equal(self, a: ir.Value, b: int | ir.Value) -> ir.Value:
        return self.b.icmp_signed("==", a, self.integer(b))

    # Memory. Offsets are in elements of the type that is read or written.

    def argument(self, index: int) -> ir.Value:
        return self.load_i64(self.function.args[0], self.const(index))

    def pointer(self, index: int) -> ir.Value:
        return self.b.inttoptr(self.argument(index), PTR)

    def at(self, base: ir.Value, offset: int | ir.Value, kind: ir.Type = F32) -> ir.Value:
        return self.b.gep(base, [self.integer(offset)], source_etype=kind)

    def apart(self, lines: list[ir.Value]) -> list[ir.Value]:
        """The same pointers to the beginnings of lines, as far as there are registers for them. The compiler no longer sees that lines lie
        at equal distances: it would find each from the one before, with an addition at every step of a loop over their numbers.
        """
        if len(lines) > _MOST_POINTERS:
            return lines
        kind = ir.FunctionType(PTR, [PTR])
        return [self.b.asm(kind, "", "=r,0", [line], False) for line in lines]

    def load_i64(self, base: ir.Value, offset: int | ir.Value) -> ir.Value:
        return self.b.load(self.at(base, offset, I64), typ=I64, align=8)

    def load_i32(self, base: ir.Value, offset: int | ir.Value) -> ir.Value:
        return self.b.sext(self.b.load(self.at(base, offset, I32), typ=I32, align=4), I64)

    def load(self, base: ir.Value, offset: int | ir.Value) -> ir.Value:
        return self.b.load(self.at(base, offset), typ=F32, align=4)

    def load_vector(self, base: ir.Value, offset: int | ir.Value) -> ir.Value:
        return self.b.load(self.at(base, offset), typ=self.vector, align=4)

    def load_int8_vector(self, base: ir.Value, offset: int | ir.Value) -> ir.Value:
        """As many int8 numbers as a vector has lanes, as float32."""
        numbers = self.b.load(self.at(base, offset, I8), typ=ir.VectorType(I8, self.lanes), align=1)
        return self.b.sitofp(self.b.sext(numbers, ir.VectorType(I32, self.lanes)), self.vector)

    def load_int8_pairs(self, base: ir.Value, offset: int | ir.Value) -> ir.Value:
        """Two int8 numbers a lane, as int16."""
        numbers = self.b.load(self.at(base, offset, I8), typ=ir.VectorType(I8, 2 * self.lanes), align=1)
        return self.b.sext(numbers, ir.VectorType(I16, 2 * self.lanes))

    def splat_int16_pair(self, base: ir.Value, pair: ir.Value) -> ir.Value:
        """The numbers 2 `pair` and 2 `pair` + 1 of int16 `base` in every lane."""
        return self.b.bitcast(self.splat_i32(self.load_i32(base, pair)), ir.VectorType(I16, 2 * self.lanes))

    def store_int8_pairs(self, first: ir.Value, second: ir.Value, base: ir.Value, offset: int | ir.Value) -> None:
        """The whole numbers of two float32 vectors, within 8 bits, a lane's two side by side."""
        wide, narrow = ir.VectorType(I32, self.lanes), ir.VectorType(I8, 2 * self.lanes)
        mask = [lane + half * self.lanes for lane in range(self.lanes) for half in (0, 1)]
        both = self.b.shuffle_vector(
            self.b.fptosi(first, wide), self.b.fptosi(second, wide), ir.Constant(ir.VectorType(I32, 2 * self.lanes), mask)
        )
        self.b.store(self.b.trunc(both, narrow), self.at(base, offset, I8), align=1)

    def store_int16(self, value: ir.Value, base: ir.Value, offset: int | ir.Value) -> None:
        """A vector's numbers, all within 16 bits, rounded."""
        numbers = self.b.trunc(self.b.fptosi(self.round(value), ir.VectorType(I32, self.lanes)), ir.VectorType(I16, self.lanes))
        self.b.store(numbers, self.at(base, offset, I16), align=2)

    def store(self, value: ir.Value, base: ir.Value, offset: int | ir.Value) -> None:
        self.b.store(value, self.at(base, offset), align=4)

    def prefetch(self, base: ir.Value, offset: ir.Value, *, near: bool = True, write: bool = False) -> None:
        """Asks for the cache line of an address that will be wanted soon; any address is allowed. `near`: into the first-level cache."""
        access, keep, data = (ir.Constant(I32, number) for number in (int(write), 3 if near else 2, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), self.at(base, offset), access, keep, data)

    def scratch(self, floats: int) -> ir.Value:
        """Room for `floats` numbers on the stack, aligned to 64 bytes."""
        slot = self._slots.alloca(ir.ArrayType(F32, floats))
        slot.align = 64
        slot.type = PTR  # llvmlite would keep the array's type and refuse other elements
        return slot

    def scratch_int32(self, count: int) -> ir.Value:
        """Room for `count` int32 on the stack."""
        slot = self._slots.alloca(ir.ArrayType(I32, count))
        slot.align = 64
        slot.type = PTR
        return slot

    def scratch_integers(self, count: int) -> ir.Value:
        """Room for `count` int64 on the stack."""
        slot = self._slots.alloca(ir.ArrayType(I64, count))
        slot.align = 64
        slot.type = PTR
        return slot

    def variable(self, value: ir.Value) -> Variable:
        slot = self._slots.alloca(value.type)
        self.b.store(value, slot)
        return Variable(self.b, slot, value.type)

    # Vectors.

    def argument_float(self, index: int) -> ir.Value:
        """A float32 passed by its bits."""
        return self.b.bitcast(self.b.trunc(self.argument(index), I32), F32)

    def extract(self, value: ir.Value) -> ir.Value:
        """The first lane."""
        return self.b.extract_element(value, ir.Constant(I32, 0))

    def lane_numbers(self, first: ir.Value) -> ir.Value:
        """int32 vector first, first + 1, ..."""
        return self.b.add(self.splat_i32(first), ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes))))

    def between(self, numbers: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
        """Lanes of the int32 vector `numbers` that lie in [low, high)."""
        above = self.b.icmp_signed(">=", numbers, self.splat_i32(low))
        return self.b.and_(above, self.b.icmp_signed("<", numbers, self.splat_i32(high)))

    def splat_i32(self, value: ir.Value) -> ir.Value:
        """An int64 in every lane of an int32 vector."""
        kind = ir.VectorType(I32, self.lanes)
        empty = ir.Constant(kind, ir.Undefined)
        first = self.b.insert_element(empty, self.b.trunc(value, I32), ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def scalar(self, value: float) -> ir.Value:
        return ir.Constant(F32, value)

    def splat(self, value: float | ir.Value) -> ir.Value:
        """A scalar in every lane."""
        if isinstance(value, int | float):
            return ir.Constant(self.vector, [float(value)] * self.lanes)
        empty = ir.Constant(self.vector, ir.Undefined)
        first = self.b.insert_element(empty, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def call(self, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
        """An LLVM intrinsic or an external function."""
        function = self.module.globals.get(name)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, [operand.type for operand in operands]), name)
        return self.b.call(function, operands)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, rounded once."""
        suffix = "f32" if a.type is F32 or a.type == F32 else f"v{self.lanes}f32"
        return self.call(f"llvm.fma.{suffix}", a.type, a, b, c)

    def multiply_pairs(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Products of int16 vectors with two numbers a lane, each pair summed: int32. Numbers are above -2**15."""
        if self.lanes == 16 and self.wide_integers:
            return self.call("llvm.x86.avx512.pmaddw.d.512", ir.VectorType(I32, 16), a, b)
        sums = []
        for start in range(0, 2 * self.lanes, 16):
            part = ir.Constant(ir.VectorType(I32, 16), list(range(start, start + 16)))
            halves = (self.b.shuffle_vector(x, x, part) for x in (a, b))
            sums.append(self.call("llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), *halves))
        whole = ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes)))
        return sums[0] if len(sums) == 1 else self.b.shuffle_vector(*sums, whole)

    def any(self, mask: ir.Value) -> ir.Value:
        """Whether one lane of a mask is set."""
        bits = ir.IntType(self.lanes)
        return self.b.icmp_unsigned("!=", self.b.bitcast(mask, bits), ir.Constant(bits, 0))

    def round(self, value: ir.Value) -> ir.Value:
        """A vector's numbers to the nearest whole ones."""
        return self.call(f"llvm.rint.v{self.lanes}f32", self.vector, value)

    def square_root(self, value: ir.Value) -> ir.Value:
        """Of a number or a vector."""
        suffix = f"v{self.lanes}f32" if value.type == self.vector else "f32"
        return self.call(f"llvm.sqrt.{suffix}", value.type, value)

    def absolute(self, value: ir.Value) -> ir.Value:
        """Of a vector."""
        return self.call(f"llvm.fabs.v{self.lanes}f32", self.vector, value)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def reduce_add(self, value: ir.Value) -> ir.Value:
        """The lanes' sum, by halves, so that the order is the same everywhere."""
        return self._reduce(value, self.b.fadd)

    def reduce_max(self, value: ir.Value) -> ir.Value:
        return self._reduce(value, self.maximum)

    def _reduce(self, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        width = self.lanes
        while width > 1:
            width //= 2
            mask = ir.Constant(ir.VectorType(I32, self.lanes), [(lane + width) % self.lanes for lane in range(self.lanes)])
            value = combine(value, self.b.shuffle_vector(value, value, mask))
        return self.extract(value)

    def exp(self, x: ir.Value) -> ir.Value:
        """e**x of a vector with x <= 88, to about 1 unit in the last place; 0 below -87 (also for -inf). exp(0) is exactly 1.

        exp(x) = 2**n * exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; exp(r) by the minimax polynomial of Cephes' expf.
        """
        tiny = self.b.fcmp_ordered("<", x, self.splat(-87.0))
        x = self.maximum(x, self.splat(-87.0))
        n = self.round(self.b.fmul(x, self.splat(1.4426950408889634)))
        r = self.fma(n, self.splat(-0.693359375), x)
        r = self.fma(n, self.splat(2.12194440e-4), r)
        p = self.splat(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, self.splat(coefficient))
        p = self.fma(p, self.b.fmul(r, r), self.b.fadd(r, self.splat(1.0)))
        integers = ir.VectorType(I32, self.lanes)
        biased = self.b.add(self.b.fptosi(n, integers), ir.Constant(integers, [127] * self.lanes))
        power = self.b.bitcast(self.b.shl(biased, ir.Constant(integers, [23] * self.lanes)), self.vector)
        return self.b.select(tiny, self.splat(0.0), self.b.fmul(p, power))

    # Control.

    @contextmanager
    def range(self, start: int | ir.Value, stop: int | ir.Value, step: int | ir.Value = 1) -> Iterator[ir.Value]:
        """for (i = start; i < stop; i += step)"""
        counter = self.variable(self.integer(start))
        stop, step = self.integer(stop), self.integer(step)
        head, body, end = (self.function.append_basic_block(name) for name in ("head", "loop", "end"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = counter.get()
        self.b.cbranch(self.less(index, stop), body, end)
        self.b.position_at_end(body)
        yield index
        counter.set(self.b.add(index, step))
        self.b.branch(head)
        self.b.position_at_end(end)

    def in_tiles(
        self, top: ir.Value, rows: ir.Value, sizes: Sequence[int], body: Callable[[int, ir.Value, ir.Value, ir.Value], None]
    ) -> None:
        """`rows` rows from `top` on, in tiles of one of `sizes` each; body(size, first row, which tile, of how many) writes a size.

        Tiles have two sizes that differ by one: a small last one would read all that it is multiplied with for next to nothing.
        """
        tiles = self.div(self.add(rows, sizes[-1] - 1), sizes[-1])
        smaller = self.div(rows, tiles)
        larger = self.sub(rows, self.mul(smaller, tiles))
        border = self.add(top, self.mul(larger, self.add(smaller, 1)))
        with self.range(0, 2) as run:
            small = self.b.icmp_signed(">", run, self.const(0))
            size = self.b.select(small, smaller, self.add(smaller, 1))
            start, stop = self.b.select(small, border, top), self.b.select(small, self.add(top, rows), border)
            done = self.b.select(small, larger, self.const(0))
            for count in sizes:
                with self.when(self.equal(size, count)), self.range(start, stop, count) as row:
                    body(count, row, self.add(done, self.div(self.sub(row, start), count)), tiles)

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        with self.b.if_then(condition):
            yield

    @contextmanager
    def shares(self, counter: ir.Value, count: ir.Value, at_once: int | ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Work items handed out to threads as they ask, `at_once` together: yields [first, last). `counter` points at an int64 0."""
        head, body, end = (self.function.append_basic_block(name) for name in ("ask", "work", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        first = self.b.atomic_rmw("add", counter, self.integer(at_once), "monotonic")
        self.b.cbranch(self.less(first, count), body, end)
        self.b.position_at_end(body)
        yield first, self.least(self.add(first, at_once), count)
        self.b.branch(head)
        self.b.position_at_end(end)

    @contextmanager
    def shares_ahead(self, counter: ir.Value, count: ir.Value, at_once: ir.Value) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
        """Like `shares`, and a thread knows where its next items begin while it works: yields first, last and what follows.

        A thread's last turn has nothing to follow: there it is the number of items.
        """
        head, body, end = (self.function.append_basic_block(name) for name in ("look", "work", "done"))
        mine = self.variable(self.b.atomic_rmw("add", counter, at_once, "monotonic"))
        self.b.branch(head)
        self.b.position_at_end(head)
        first = mine.get()
        self.b.cbranch(self.less(first, count), body, end)
        self.b.position_at_end(body)
        following = self.b.atomic_rmw("add", counter, at_once, "monotonic")
        mine.set(following)
        yield first, self.least(self.add(first, at_once), count), self.least(following, count)
        self.b.branch(head)
        self.b.position_at_end(end)
