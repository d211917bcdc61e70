"""The transformers config that a GGUF file's metadata describes.

Sources: the GGUF specification (ggml/docs/gguf.md) for the keys; llama.cpp's hyperparameter loading for what it knows without a key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoints.gguf_layouts import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from engine.checkpoints.gguf_file import GGUFFile
    from engine.checkpoints.gguf_layouts import Layout


def read_config(file: GGUFFile, layout: Layout) -> dict[str, Any]:
    """The arguments of the transformers config class. Raises ValueError for missing keys and for what it cannot express."""
    own = file.own
    if own("expert_count", 0):
        raise ValueError(f"this {file.architecture} GGUF file is a mixture of experts; load the original safetensors checkpoint instead")
    hidden, heads = file.need(f"{file.architecture}.embedding_length"), file.need(f"{file.architecture}.attention.head_count")
    if not isinstance(heads, int):
        message = f"this {file.architecture} GGUF file has another number of heads in each layer, which is not supported"
        raise ValueError(message)  # noqa: TRY004 - the file is at fault, not the caller's types
    # Phi-3 rotates a part of each head; for all others the rotated width is the head's.
    partial = layout.model_type == "phi3"
    head_dim = own("attention.key_length") or (None if partial else own("rope.dimension_count")) or hidden // heads
    rotated = own("rope.dimension_count", head_dim)
    if own("attention.value_length", head_dim) != head_dim or (rotated != head_dim and not partial):
        raise ValueError("key, value and rotary dimensions differ; this layout is not supported")
    config: dict[str, Any] = {
        "model_type": layout.model_type,
        "hidden_size": hidden,
        "intermediate_size": file.need(f"{file.architecture}.feed_forward_length"),
        "num_hidden_layers": file.need(f"{file.architecture}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.need(f"{file.architecture}.context_length"),
        "rms_norm_eps": file.need(f"{file.architecture}.attention.layer_norm_rms_epsilon"),
        "vocab_size": len(file.need("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in file.tensor_names(),
        "rope_parameters": _rope(file, head_dim, rotated),
    }
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        config[name] = file.get(f"tokenizer.ggml.{key}_token_id")
    if layout.model_type in _OWN_VALUES:
        config.update(_OWN_VALUES[layout.model_type](file, config))
    return config


def _rope(file: GGUFFile, head_dim: int, rotated: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": file.own("rope.freq_base", 10000.0), "rope_type": "default"}
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    kind, factor = file.own("rope.scaling.type", "none"), file.own("rope.scaling.factor", 1.0)
    original = file.own("rope.scaling.original_context_length")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        if original:
            rope["original_max_position_embeddings"] = original
        if file.own("rope.scaling.attn_factor"):
            rope["attention_factor"] = file.own("rope.scaling.attn_factor")
    elif kind not in ("none", "longrope"):
        raise ValueError(f"rope scaling type {kind!r} of this GGUF file is not supported")
    names = file.tensor_names()
    if ROPE_FACTORS in names:
        rope |= _llama3_scaling(file.tensor(ROPE_FACTORS), rope["rope_theta"], head_dim)
    if LONG_FACTORS in names:
        rope |= {
            "rope_type": "longrope",
            "short_factor": [float(str(value)) for value in file.tensor(SHORT_FACTORS)],
            "long_factor": [float(str(value)) for value in file.tensor(LONG_FACTORS)],
            "original_max_position_embeddings": file.need(f"{file.architecture}.rope.scaling.original_context_length"),
            "attention_factor": file.need(f"{file.architecture}.rope.scaling.attn_factor"),
        }
    return rope


def _llama3_scaling(factors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.x files carry the divisors of each frequency instead of the four numbers behind them; find the numbers that give them."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, original = 1.0, 4.0, 8192
    for factor in (8.0, 32.0):
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if np.allclose(expected, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(f"{ROPE_FACTORS} of this GGUF file follows no known scaling")


def _gemma(_file: GGUFFile, _config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _gemma2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.need("gemma2.attention.sliding_window"),
        "attn_logit_softcapping": file.need("gemma2.attn_logit_softcapping"),
        "final_logit_softcapping": file.need("gemma2.final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
    }


def _gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_theta": file.own("rope.freq_base", 1000000.0), "rope_type": "default"}
    if (factor := file.own("rope.scaling.factor", 1.0)) != 1.0:
        full |= {"rope_type": "linear", "factor": factor}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": file.need("gemma3.attention.sliding_window"),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_theta": file.own("rope.freq_base_swa", 10000.0), "rope_type": "default"},
        },
    }


def _query_scalar(config: dict[str, Any], layers_of_27b: int) -> int:
    """27B alone scales queries by hidden_size / heads; the file does not say so (llama.cpp tells by the layer count, too)."""
    is_27b = config["num_hidden_layers"] == layers_of_27b
    return int(config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"])


def _phi3(file: GGUFFile, _config: dict[str, Any]) -> dict[str, Any]:
    # Written as 0 where the model has none.
    return {
        "sliding_window": file.own("attention.sliding_window") or None,
        "original_max_position_embeddings": file.own("rope.scaling.original_context_length", _config["max_position_embeddings"]),
    }


def _olmo2(file: GGUFFile, _config: dict[str, Any]) -> dict[str, Any]:
    if file.own("attention.sliding_window"):
        raise ValueError("this olmo2 GGUF file has a sliding window, which makes it an OLMo-3; load its safetensors checkpoint instead")
    return {}


def _granite(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Factors of 1 are not written. llama.cpp scales attention by 1 / sqrt(head_dim) where the file does not say."""
    return {
        "attention_multiplier": file.own("attention.scale") or config["head_dim"] ** -0.5,
        "embedding_multiplier": file.own("embedding_scale") or 1.0,
        "residual_multiplier": file.own("residual_scale") or 1.0,
        "logits_scaling": file.own("logit_scale") or 1.0,
    }


_OWN_VALUES: dict[str, Callable[[GGUFFile, dict[str, Any]], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
}
"""What a family's config has beyond the common keys, by `model_type`."""
