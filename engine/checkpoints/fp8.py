"""Checkpoints stored as float8_e4m3fn with a scale for each block (quant_method "fp8": Qwen3-FP8, DeepSeek-V3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

_SUFFIX = "_scale_inv"


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """What blocks of the stored weights are multiplied with, by weight name; `block` is (rows, columns). Empty for other checkpoints.

    keep: products use the weights as they are stored (a GPU); otherwise they are widened when they are loaded.
    """

    block: tuple[int, int] = (1, 1)
    by_name: Mapping[str, torch.Tensor] = field(default_factory=dict)
    keep: bool = False


def fp8_block(quantisation: Any) -> tuple[int, int] | None:
    """The block that a scale stands for, of a config's `quantization_config`; None for anything but block-scaled fp8."""
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != "fp8":
        return None
    block = quantisation.get("weight_block_size")
    return (int(block[0]), int(block[1])) if isinstance(block, list | tuple) and len(block) == 2 else None


def take_scales(tensors: dict[str, torch.Tensor], quantisation: Any) -> Fp8Scales:
    """Takes the scales out of a checkpoint's `tensors`. Raises ValueError for an fp8 weight without one, or a scale without its weight."""
    scales = {name.removesuffix(_SUFFIX): tensors.pop(name).float() for name in [*tensors] if name.endswith(_SUFFIX)}
    stored = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    if stored != scales.keys():
        odd = sorted(stored ^ scales.keys())
        raise ValueError(f"fp8 weights and their scales ({_SUFFIX}) do not pair up: {', '.join(odd[:6])}")
    block = fp8_block(quantisation)
    if scales and block is None:
        raise ValueError(f"the checkpoint has fp8 weights, but its config gives no weight_block_size: {quantisation}")
    return Fp8Scales(block or (1, 1), scales)
