"""Compiles kernels for the processor at hand and runs them on the threads that torch's own operations use."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import llvmlite
import llvmlite.binding as llvm
import torch
from llvmlite import ir

from kernels.native.emit import Emitter
from kernels.native.objects import Objects

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_ARGUMENTS = 24
_Arguments = ctypes.c_int64 * MOST_ARGUMENTS
_engines: list[llvm.ExecutionEngine] = []
_EFFORT = 3
"""LLVM's level of optimisation."""
_OBJECTS = 1
"""Part of what is kept is known by: raise it when `_machine_code` compiles otherwise."""
_kept: list[Objects] = []
"""Where machine code is kept, if anywhere."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled `void f(int64 *arguments)` that shares its work out over whoever calls it with the same arguments."""

    address: int
    call: Callable[[int], None]
    parallel: Callable[[int, int, int, int], None]

    def __call__(self, threads: int, *arguments: int) -> None:
        """Pointers and numbers, as integers; those not given are 0. The GIL is released while it runs."""
        block = _Arguments(*arguments)
        if threads == 1:
            self.call(ctypes.addressof(block))
        else:
            self.parallel(self.address, ctypes.addressof(block), threads, 0)


_NUMBERS_A_THREAD = 1 << 14


def threads_for(numbers: int) -> int:
    """Threads worth waking for work that touches or multiplies so many numbers (some 3 us of it are worth one)."""
    return min(torch.get_num_threads(), numbers // _NUMBERS_A_THREAD + 1)


@cache
def lanes() -> int:
    """float32 numbers in a vector register of this processor; 0 where it has no fused multiply-add on vectors."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") and features.get("fma") else 0


@cache
def openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, if it is GNU's: kernels join its threads instead of bringing their own."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        loaded = ctypes.CDLL(str(library))
        if hasattr(loaded, "GOMP_parallel"):
            return loaded
    return None


def build(name: str, body: Callable[[Emitter], None]) -> Kernel:
    """Compiles the function that `body` writes."""
    module = ir.Module(name)
    module.triple = llvm.get_default_triple()
    emitter = Emitter(module, name, lanes(), wide_integers=bool(llvm.get_host_cpu_features().get("avx512bw")))
    body(emitter)
    emitter.finish()
    address = _compile(module, name)
    runtime = openmp()
    if runtime is None:
        raise RuntimeError("no OpenMP runtime to run native kernels on; `kernels.native.available` says so beforehand")
    parallel = runtime.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return Kernel(address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), parallel)


def parallel_address() -> int:
    """Of GOMP_parallel(function, argument, threads, flags). Only where `openmp` found a runtime."""
    runtime = openmp()
    assert runtime is not None
    return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value or 0


def keep_in(folder: Path) -> None:
    """What is compiled from now on is kept in `folder`, and read from there where it lies already."""
    _kept[:] = [Objects(folder)]


@cache
def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=_EFFORT, jit=True)


def _compile(module: ir.Module, name: str) -> int:
    text = str(module)
    key = hashlib.sha256("\n".join((*_circumstances(), text)).encode()).hexdigest()
    code = next((found for kept in _kept if (found := kept.get(key)) is not None), None)
    if code is None:
        code = _machine_code(text)
        for kept in _kept:
            kept.put(key, code)
    # Only machine code goes to the engine: it would keep the module, and the global context its constants, megabytes of each product.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # owns the code
    return int(engine.get_function_address(name))


def _machine_code(text: str) -> bytes:
    parsed = llvm.parse_assembly(text, context=llvm.create_context())
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=_EFFORT)
    # Kernels are written as they should run: vectorised and unrolled by hand.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(_machine(), options)
    builder.getModulePassManager().run(parsed, builder)
    return bytes(_machine().emit_object(parsed))


@cache
def _circumstances() -> tuple[str, ...]:
    """What machine code depends on beside the text that it is compiled from."""
    compiler = f"{llvmlite.__version__} {llvm.llvm_version_info} {_EFFORT} {_OBJECTS}"
    return compiler, llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
