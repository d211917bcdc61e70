"""Launches that compile and do not run: for devices that are not there, and in processes beside the one that has the device.

What is compiled is what a launch would compile, specialisation and all, down to machine code. It lies in Triton's cache afterwards, so
the process that launches it finds it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from kernels.triton.target import Traits, standing_in, traits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from triton.backends.compiler import GPUTarget

_MOST_LAUNCHES = 1 << 14


@dataclass(frozen=True, slots=True)
class Absent:
    """As much of a device as compiling asks for. starter: makes the host's code that starts a kernel, of (source, metadata)."""

    target: GPUTarget
    traits: Traits
    starter: Callable[[Any, Any], object] | None = None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"absent {self.target.arch}"

    def get_current_stream(self, device: object) -> int:  # noqa: ARG002 - Triton's protocol
        return 0

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def compiling(
    device: Absent, compiled: Callable[[Any, Any], None], wanted: Callable[[Any, Any, Any], bool] = lambda *_: True
) -> Iterator[None]:
    """Within it, launches compile for `device`, whatever device their tensors are on; tensors without numbers ("meta") do.

    compiled: told of each (kernel, what Triton made of it). wanted: asked before, of (kernel, its arguments, its constants).
    """

    def launch(self: Any, grid: object) -> Callable[..., None]:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            if wanted(self, args, kwargs):
                compiled(self, self.run(*args, grid=grid, warmup=True, **kwargs))

        return compile_it

    before = driver._active
    driver.set_active(device)
    try:
        with mock.patch.object(KernelInterface, "__getitem__", launch), standing_in(device.traits), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton announces its next defaults
            yield
    finally:
        driver._active = before


def compile_in_parallel(walk: Callable[[], object], device: torch.device, limit: float, processes: int | None = None) -> int:
    """Compiles the launches that `walk` makes in forked processes, one a core, for `device`, a GPU; returns how many there were.

    Every process walks; of launches that are alike the first that comes by compiles one. `walk` must launch the same in all of them, and
    must not use the device otherwise. What fails to compile is left to whoever launches it. Gives up after `limit` seconds.
    """
    driver_now = driver.active
    absent = Absent(driver_now.get_current_target(), traits(device), getattr(driver_now, "launcher_cls", None))
    return share(walk, absent, limit, processes)


def share(walk: Callable[[], object], absent: Absent, limit: float, processes: int | None = None) -> int:
    """`compile_in_parallel` for a device that is described."""
    context = multiprocessing.get_context("fork")
    taken = context.Array(ctypes.c_bool, _MOST_LAUNCHES)
    arguments = (walk, absent, taken)
    workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(processes or len(os.sched_getaffinity(0)))]
    until = time.monotonic() + limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads at a fork: these processes take no lock that one could hold
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join(max(until - time.monotonic(), 0.0))
        if worker.is_alive():
            worker.kill()
            worker.join()
    return sum(taken[:])


def _work(walk: Callable[[], object], absent: Absent, taken: Any) -> None:
    order: dict[object, int] = {}

    def wanted(kernel: Any, args: Any, constants: Any) -> bool:
        known = len(order)
        number = order.setdefault(_alike(kernel, args, constants), known)
        if number < known or number >= _MOST_LAUNCHES:
            return False
        with taken.get_lock():
            if taken[number]:
                return False
            taken[number] = True
        return True

    def compiled(_: Any, made: Any) -> None:
        if absent.starter is not None:
            absent.starter(made.src, made.metadata)

    torch.set_num_threads(1)
    # Reported by the process that launches it, if it does.
    with compiling(absent, compiled, wanted), _skipping_failures():
        walk()


@contextlib.contextmanager
def _skipping_failures() -> Iterator[None]:
    """Within it, launches that raise are passed over."""
    launch = KernelInterface.__getitem__

    def safely(self: Any, grid: object) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(Exception):
                launch(self, grid)(*args, **kwargs)

        return attempt

    with mock.patch.object(KernelInterface, "__getitem__", safely):
        yield


def _alike(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> object:
    """What Triton specialises a launch on."""
    seen: list[object] = [kernel.__name__, *sorted((name, str(value)) for name, value in constants.items())]
    for value, parameter in zip(args, kernel.params, strict=False):
        if isinstance(value, torch.Tensor):
            seen.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not parameter.do_not_specialize:
            seen.append((value == 1, value % 16 == 0, value >= 1 << 31))
        else:
            seen.append(type(value))
    return tuple(seen)
