"""What a config alone says against serving a model. What only running it shows is found by `engine.models.fallback`."""

from __future__ import annotations

from typing import Any

_PAGED = frozenset({"full_attention", "sliding_attention"})
_STATEFUL = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Values of `layer_types` that mean a recurrent or convolutional state."""


def refuse(config: Any) -> None:
    """Raises ValueError with the model type and the reason, for a transformers config of a model that cannot be served."""
    reason = _reason(config)
    if reason is not None:
        raise ValueError(f"{config.model_type} {reason}")


def _reason(config: Any) -> str | None:
    for tower, kind in (("vision_config", "a vision"), ("audio_config", "an audio")):
        if getattr(config, tower, None) is not None:
            return f"has {kind} tower; only models of text alone can be served"
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder model; only decoder-only models can be served"
    if getattr(config, "kv_lora_rank", None):
        return "uses multi-head latent attention, whose cache holds no separate keys and values"
    kinds = set(getattr(config, "layer_types", None) or ()) - _PAGED
    if stateful := kinds & _STATEFUL:
        return f"has layers of type {_listed(stateful)}, which keep a state that rejected draft tokens could not be taken out of"
    if kinds:
        return f"has layers of type {_listed(kinds)}; only full and sliding attention can be paged"
    return _reason_of_class(config)


def _reason_of_class(config: Any) -> str | None:
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping  # transformers' own table: config class -> model class
    if type(config) not in mapping:
        return "is not a language model that transformers can generate text with"
    model = mapping[type(config)]
    if getattr(model, "_is_stateful", False):
        return "keeps recurrent state, which rejected draft tokens could not be taken out of"
    if not getattr(model, "_supports_attention_backend", False):
        return "does not use transformers' attention interface"
    return None


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
