"""Many kernel calls in one: what a step of few rows spends on being told what to do is as much as a tenth of it.

A program is a table with a row for each call: [address of the kernel, threads, arguments ...]. Tables are filled once and only what
changes from step to step is written again, for all layers at once; a small compiled loop then runs them in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir

from kernels.native.emit import I32, I64, PTR
from kernels.native.jit import MOST_ARGUMENTS, Kernel, build, parallel_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kernels.native.emit import Emitter

WIDTH = 2 + MOST_ARGUMENTS


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel with its arguments, not run yet. No threads: it is to be left out."""

    kernel: Kernel
    threads: int
    arguments: tuple[int, ...]

    def run(self) -> None:
        self.kernel(self.threads, *self.arguments)

    def row(self) -> NDArray[np.int64]:
        """int64 [WIDTH]."""
        row = np.zeros(WIDTH, np.int64)
        row[:2] = self.kernel.address, self.threads
        row[2 : 2 + len(self.arguments)] = self.arguments
        return row


def run(table: NDArray[np.int64]) -> None:
    """Runs the calls of int64 [calls, WIDTH] (contiguous) in order. Counters of handed-out work in it are used up."""
    _loop()(1, len(table), table.ctypes.data, parallel_address())


def fill(table: NDArray[np.int64], rows: NDArray[np.int64], call: Call, changing: Sequence[int]) -> None:
    """Writes threads and the `changing` arguments of `call` into some rows of table [calls, WIDTH]."""
    columns = [1, *(2 + index for index in changing)]
    table[rows[:, None], columns] = [call.threads, *(call.arguments[index] for index in changing)]


@cache
def _loop() -> Kernel:
    return build("program", _emit)


def _emit(e: Emitter) -> None:
    count, table, parallel = e.argument(0), e.pointer(1), e.argument(2)
    single = ir.FunctionType(ir.VoidType(), [PTR])
    shared = ir.FunctionType(ir.VoidType(), [PTR, PTR, I32, I32])
    start = e.b.inttoptr(parallel, shared.as_pointer())
    with e.range(0, count) as index:
        row = e.at(table, e.mul(index, WIDTH), I64)
        address, threads = e.load_i64(row, 0), e.load_i64(row, 1)
        arguments = e.at(row, 2, I64)
        with e.when(e.equal(threads, 1)):
            e.b.call(e.b.inttoptr(address, single.as_pointer()), [arguments])
        with e.when(e.b.icmp_signed(">", threads, e.const(1))):
            function = e.b.inttoptr(address, PTR)
            e.b.call(start, [function, arguments, e.b.trunc(threads, I32), ir.Constant(I32, 0)])
