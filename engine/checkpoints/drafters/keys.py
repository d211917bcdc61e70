"""Reading config keys with errors that name them."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.drafters.errors import DrafterError

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}


def integer(config: dict[str, Any], key: str, default: int | None = None, *, least: int = 0) -> int:
    """A whole number of at least `least`. Raises DrafterError naming the key."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DrafterError(f"config.json: {key} must be a whole number of at least {least}, got {value!r}")
    return value


def integers(config: dict[str, Any], key: str) -> tuple[int, ...]:
    """A list of whole numbers, not empty. Raises DrafterError naming the key."""
    value = config.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise DrafterError(f"config.json: {key} must be a list of layer numbers, got {value!r}")
    return tuple(value)


def choice(config: dict[str, Any], key: str, allowed: tuple[str, ...], default: str) -> str:
    """One of `allowed`. Raises DrafterError naming the key."""
    value = str(config.get(key, default)).lower()
    if value not in allowed:
        raise DrafterError(f"config.json: {key} is {value!r}, must be one of {', '.join(allowed)}")
    return value


def activation(config: dict[str, Any], key: str = "hidden_act") -> str:
    """The activation's name in `kernels.gated_activation`. Raises DrafterError for one that has none."""
    value = config.get(key, "silu")
    if value not in _ACTIVATIONS:
        raise DrafterError(f"config.json: {key} is {value!r}, supported are {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[value]
