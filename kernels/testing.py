"""Inputs, exact results and tolerances of every Triton op, shared by its tests (interpreter and device) and its benchmarks.

Each `Case` makes fresh random inputs, knows the exact result (the reference in float64), and runs the Triton op itself.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Norm of the error over the norm of the result."""


@dataclass(frozen=True, slots=True)
class Case:
    """`run(device)` gives (what the op made, what is exact), tensor by tensor; floats are compared by norm, the rest exactly."""

    op: str
    name: str
    run: Callable[[torch.device], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
    tolerance: float = 0.0
    least: float = 1e-3
    """Smaller results count as if they were this large: inputs are of order 1, and what cancels keeps their absolute error."""

    def check(self, device: torch.device) -> None:
        """Raises AssertionError naming the case, and how far off which result is."""
        made, exact = self.run(device)
        for index, (one, other) in enumerate(zip(made, exact, strict=True)):
            if one.shape != other.shape:
                raise AssertionError(f"{self.op}/{self.name}: result {index} is {tuple(one.shape)}, not {tuple(other.shape)}")
            if other.is_floating_point():
                error = relative_error(one, other, self.least)
                if not error <= self.tolerance:  # NaN never passes
                    raise AssertionError(f"{self.op}/{self.name}: result {index} is off by {error:.3g}, allowed {self.tolerance:.3g}")
            elif not bool((one == other).all()):
                wrong = (one != other).flatten().nonzero().flatten()[:8].tolist()
                raise AssertionError(f"{self.op}/{self.name}: result {index} differs at {wrong}")


def relative_error(made: torch.Tensor, exact: torch.Tensor, least: float = 1e-3) -> float:
    """||made - exact|| / ||exact||, in float64, where the norm of `exact` counts for no less than if each number were `least`."""
    difference = (made.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp(min=least * exact.numel() ** 0.5))


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within it, new tensors hold NaN (or a large number), so that a result which nothing wrote cannot look right by chance.

    torch fills what it allocates in its deterministic mode unless told not to.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True, slots=True)
class Paged:
    """A step's attention inputs: S sequences with scattered blocks, keys and values all random."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tables: torch.Tensor
    query_start: torch.Tensor
    kv_lengths: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def paged_inputs(
    queries: Sequence[int],
    contexts: Sequence[int],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    fp8: bool = False,
    shared_blocks: int = 0,
) -> Paged:
    """queries: rows of each sequence; contexts: its keys, rows included. shared_blocks: leading blocks that all tables have in common."""
    width = max(-(-context // block_size) for context in contexts) + 1
    size = len(queries)
    blocks = torch.randperm(size * width, device=device)[: size * width].view(size, width).to(torch.int32) + 1
    if shared_blocks:
        blocks[:, :shared_blocks] = blocks[0, :shared_blocks].clone()
    shape = (size * width + 1, kv_heads, block_size, dim)
    k_cache, v_cache = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    k_scale = v_scale = None
    if fp8:
        k_cache, v_cache = k_cache.to(torch.float8_e4m3fn), v_cache.to(torch.float8_e4m3fn)
        k_scale, v_scale = (torch.rand(kv_heads, device=device) + 0.5 for _ in range(2))
    bounds = torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32)
    q = torch.randn(sum(queries), heads, dim, device=device).to(dtype)
    return Paged(q, k_cache, v_cache, blocks, bounds, torch.tensor(contexts, dtype=torch.int32, device=device), k_scale, v_scale)
