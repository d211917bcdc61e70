"""What launchers need to know of the device, asked once."""

from __future__ import annotations

from functools import cache

import torch
import triton

_CPU_PROCESSORS = 4


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (chosen when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units on ROCm) of `device`; a small number in the interpreter."""
    if device.type == "cpu":
        return _CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def converts_fp8(device: torch.device) -> bool:
    """Whether the device has instructions that convert e4m3; without them the bits are taken apart.

    Triton's interpreter truncates where devices round to nearest, so it takes them apart too.
    """
    if device.type == "cpu":
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def needs_wide_dot(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies bfloat16 matrices wrongly: there, operands are widened first."""
    return dtype == torch.bfloat16 and interpreted()
