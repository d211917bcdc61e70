"""Gated activations (SwiGLU, GeGLU; arXiv 2002.05202) of a fused gate/up product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu": functional.relu,
}


def gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up. gate_up: [T, 2 * I], gate first; returns [T, I]. Raises KeyError for an unknown activation."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate).mul_(up)
