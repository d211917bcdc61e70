"""How each GGUF architecture maps to transformers: config keys, tensor names, and what llama.cpp's converter changed in the weights.

Sources: the GGUF specification (ggml/docs/gguf.md) and the tensor names of gguf-py's constants.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.checkpoints.gguf_file import GGUFFile

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """block: tensor names inside a layer. interleaved_qk: llama.cpp reordered q and k rows for its own rotation.
    unit_offset: the file stores 1 + the norm weights that transformers stores. config: fixed config values."""

    model_type: str
    block: dict[str, str]
    interleaved_qk: bool = False
    unit_offset: bool = False
    config: dict[str, Any] = field(default_factory=dict)


LAYOUTS: dict[str, Layout] = {
    "llama": Layout("llama", _BLOCK, interleaved_qk=True),
    "qwen2": Layout("qwen2", _BLOCK),
    "qwen3": Layout("qwen3", {**_BLOCK, **_QK_NORM}),
    "gemma3": Layout(
        "gemma3_text",
        {
            **_BLOCK,
            **_QK_NORM,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        unit_offset=True,
        config={"hidden_activation": "gelu_pytorch_tanh"},
    ),
}


def layout_of(file: GGUFFile) -> Layout:
    """Raises ValueError for an architecture that has no layout here."""
    if file.architecture not in LAYOUTS:
        raise ValueError(f"GGUF architecture {file.architecture!r} is not supported, only {', '.join(LAYOUTS)}")
    return LAYOUTS[file.architecture]


def transformers_name(name: str, layout: Layout) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises ValueError for a name the layout does not know."""
    if match := _BLOCK_NAME.fullmatch(name):
        index, part, kind = match.groups()
        if part in layout.block:
            return f"model.layers.{index}.{layout.block[part]}.{kind}"
    else:
        part, _, kind = name.rpartition(".")
        if part in _GLOBAL:
            return f"{_GLOBAL[part]}.{kind}"
    raise ValueError(f"the GGUF file has a tensor that its architecture does not use: {name}")


def restore(name: str, values: NDArray[np.float32], layout: Layout, config: dict[str, Any]) -> NDArray[np.float32]:
    """Undoes what the GGUF converter did to a tensor; `name` is transformers'."""
    if layout.unit_offset and name.endswith("norm.weight"):
        return values - np.float32(1.0)
    if layout.interleaved_qk and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
    return values


def read_config(file: GGUFFile, layout: Layout) -> dict[str, Any]:
    """The arguments of the transformers config class. Raises ValueError for missing keys and scalings it cannot express."""
    own = file.own
    hidden, heads = file.need(f"{file.architecture}.embedding_length"), file.need(f"{file.architecture}.attention.head_count")
    head_dim = own("attention.key_length") or own("rope.dimension_count") or hidden // heads
    if own("attention.value_length", head_dim) != head_dim or own("rope.dimension_count", head_dim) != head_dim:
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
        **layout.config,
    }
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        config[name] = file.get(f"tokenizer.ggml.{key}_token_id")
    config.update(_gemma3_values(file, config) if layout.model_type == "gemma3_text" else {"rope_parameters": _rope(file, head_dim)})
    return config


def _rope(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": file.own("rope.freq_base", 10000.0), "rope_type": "default"}
    kind, factor = file.own("rope.scaling.type", "none"), file.own("rope.scaling.factor", 1.0)
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        if original := file.own("rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        raise ValueError(f"rope scaling type {kind!r} of this GGUF file is not supported")
    if ROPE_FACTORS in file.tensor_names():
        rope |= _llama3_scaling(file.tensor(ROPE_FACTORS), rope["rope_theta"], head_dim)
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


def _gemma3_values(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_theta": file.own("rope.freq_base", 1000000.0), "rope_type": "default"}
    if (factor := file.own("rope.scaling.factor", 1.0)) != 1.0:
        full |= {"rope_type": "linear", "factor": factor}
    # 27B alone scales queries by hidden_size / heads; the file does not say so (llama.cpp tells by the layer count, too).
    is_27b = config["num_hidden_layers"] == 62
    return {
        "sliding_window": file.need("gemma3.attention.sliding_window"),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"],
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_theta": file.own("rope.freq_base_swa", 10000.0), "rope_type": "default"},
        },
    }
