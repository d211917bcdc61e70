"""Compiles kernels for devices that are not there: launchers run as always, on CPU tensors, and a launch compiles instead of running.

So what is compiled is what a launch on such a device would compile, specialisation and all, down to the cubin that `ptxas` makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}


class _AbsentDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target.arch)

    def get_current_stream(self, device: object) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@dataclass(frozen=True)
class Compiled:
    kernel: str
    spills: int | None
    registers: int | None
    shared: int


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Within it, launches compile for `target` (see TARGETS) and note what came of it; errors are the compiler's own."""
    found: list[Compiled] = []

    def launch(self: Any, grid: object) -> Callable[..., None]:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            binary = "hsaco" if TARGETS[target].backend == "hip" else "cubin"
            assert kernel.asm[binary], f"{self.__name__}: no {binary}"
            found.append(Compiled(self.__name__, None, None, kernel.metadata.shared))

        return compile_it

    original, before = KernelInterface.__getitem__, driver._active
    driver.set_active(_AbsentDevice(TARGETS[target]))
    KernelInterface.__getitem__ = launch  # type: ignore[method-assign]
    try:
        yield found
    finally:
        KernelInterface.__getitem__ = original  # type: ignore[method-assign]
        driver._active = before


assert not triton.knobs.runtime.interpret, "the interpreter is on: nothing would be compiled"
