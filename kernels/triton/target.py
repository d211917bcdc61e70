"""What launchers need to know of the device, asked once."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton

if TYPE_CHECKING:
    from collections.abc import Iterator

_CPU_PROCESSORS = 4


@dataclass(frozen=True, slots=True)
class Traits:
    """processors: streaming multiprocessors (compute units on ROCm). converts_fp8: whether there are instructions that convert e4m3."""

    processors: int
    converts_fp8: bool


_STANDING_IN: list[Traits] = []


@contextlib.contextmanager
def standing_in(others: Traits) -> Iterator[None]:
    """Within it, every device has these traits: launches are compiled for one that their tensors are not on."""
    _STANDING_IN.append(others)
    try:
        yield
    finally:
        _STANDING_IN.pop()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (chosen when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def traits(device: torch.device) -> Traits:
    return _STANDING_IN[-1] if _STANDING_IN else _traits(device)


@cache
def _traits(device: torch.device) -> Traits:
    """On a CPU a small number of processors. Triton's interpreter truncates where devices round to nearest, so it takes e4m3 apart."""
    if device.type == "cpu":
        return Traits(_CPU_PROCESSORS, converts_fp8=False)
    native = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
    return Traits(int(torch.cuda.get_device_properties(device).multi_processor_count), native)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on ROCm) of `device`; a small number in the interpreter."""
    return traits(device).processors


def converts_fp8(device: torch.device) -> bool:
    """Whether the device has instructions that convert e4m3; without them the bits are taken apart."""
    return traits(device).converts_fp8


def needs_wide_dot(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies bfloat16 matrices wrongly: there, operands are widened first."""
    return dtype == torch.bfloat16 and interpreted()
