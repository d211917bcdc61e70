"""Rotary angles, taken from the model's own transformers module, so that every scaling type is theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Rope:
    """inv_freq: float32 [R / 2], in radians per position. scaling: what cosine and sine are multiplied with (YaRN, longrope)."""

    inv_freq: torch.Tensor
    scaling: float

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [T, R] of int64 positions [T] as `kernels.rotary` takes them; computed in float32, rounded to dtype at the end."""
        half = positions[:, None].to(torch.float32) * self.inv_freq
        cos, sin = half.cos().mul_(self.scaling).to(dtype), half.sin().mul_(self.scaling).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def read_ropes(rotary_module: type, config: Any, names: set[str], device: torch.device) -> dict[str, Rope]:
    """Builds transformers' rotary module of this model and reads its tables: `all`, or one for each layer type in `names`."""
    module = rotary_module(config=config)
    ropes = {}
    for name in names:
        prefix = "" if name == "all" else f"{name}_"
        inv_freq = getattr(module, f"{prefix}inv_freq").to(device=device, dtype=torch.float32)
        ropes[name] = Rope(inv_freq, float(getattr(module, f"{prefix}attention_scaling")))
    return ropes
