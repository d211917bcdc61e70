"""Products with weights stored as e4m3 and a scale for each block of them (as DeepSeek-V3 and Qwen3's FP8 checkpoints are)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

FP8_STEP = 128
"""Inputs that the product takes at a time: a block of scales spans a multiple of it, or all inputs."""


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """weight: float8_e4m3fn [out, in]. scale: float32 [ceil(out / block[0]), ceil(in / block[1])], what a block is multiplied with.

    A scale of each row has block (1, in), one of the whole weight (out, in). bias: [out] or None. Raises ValueError where the scale
    has another shape than the blocks ask for.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        wanted = tuple(-(-size // block) for size, block in zip(self.weight.shape, self.block, strict=True))
        if tuple(self.scale.shape) != wanted or self.weight.dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"a weight {tuple(self.weight.shape)} in blocks {self.block} is float8_e4m3fn with scales {wanted}, "
                f"got {self.weight.dtype} and {tuple(self.scale.shape)}"
            )

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def dequantise(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """[out, in] in `dtype`; arguments as in `Fp8Linear`."""
    rows = scale.repeat_interleave(block[0], 0)[: weight.shape[0]]
    return (weight.float() * rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]]).to(dtype)


def fp8_linear(x: torch.Tensor, packed: Fp8Linear, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in] @ weight.T (+ bias) (+ residual [T, out]) in x's dtype."""
    y = functional.linear(x, dequantise(packed.weight, packed.scale, packed.block, x.dtype), packed.bias)
    return y if residual is None else y + residual
