"""Whether a checkpoint fits a device, before anything of it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from engine.checkpoints.tensors import header, weight_files

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
MINIMAL_CONTEXT = 2048
"""Tokens of KV cache without which a worker is of little use; a model with a shorter context needs no more than that."""
MINIMAL_ROWS = 64
"""Rows of a step that activations and logits are reckoned for."""


class NotEnoughMemoryError(ValueError):
    """The model is too large for the device."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """Bytes that a model needs at least."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


def requirement(directory: Path, config: Any, itemsize: int, *, int8: bool = False) -> Requirement:
    """From the headers of the weight files and the config (transformers'). `itemsize`: bytes of a number once loaded, where `int8` says
    that weights have one, except an embedding's. Raises ValueError.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    context = min(getattr(text, "max_position_embeddings", None) or MINIMAL_CONTEXT, MINIMAL_CONTEXT)
    width = max(8 * text.hidden_size, 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size))
    return Requirement(
        weights=count_parameters(directory) * (1 if int8 else itemsize) + text.vocab_size * text.hidden_size * itemsize * int8,
        kv_cache=2 * text.num_hidden_layers * kv_heads * head_dim * itemsize * context,
        activations=MINIMAL_ROWS * (width * itemsize + text.vocab_size * 4),  # logits are float32
    )


def check_fit(name: str, needed: Requirement, available: int, device: str) -> None:
    """Raises NotEnoughMemoryError with what is needed and what there is."""
    if needed.total <= available:
        return
    raise NotEnoughMemoryError(
        f"{name} needs {needed.total / GIB:.2f} GiB on {device} (weights {needed.weights / GIB:.2f}, KV cache {needed.kv_cache / GIB:.2f}, "
        f"activations {needed.activations / GIB:.2f}) and {available / GIB:.2f} GiB are available; "
        f"choose a smaller model, a smaller dtype, or a larger device"
    )


def count_parameters(directory: Path) -> int:
    """Numbers in all weight files, from their headers alone."""
    return sum(prod(tensor["shape"]) for path in weight_files(directory) for tensor in header(path)[1].values())
