"""How each GGUF architecture's tensors map to transformers': their names, and what llama.cpp's converter changed in the weights.

Sources: the GGUF specification (ggml/docs/gguf.md) and the tensor names of gguf-py's constants. The config is gguf_config's part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
IN_CONFIG = frozenset({ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS})
"""Tensors that transformers keeps in the config."""


_GEMMA_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OLMO2_BLOCK = {
    **{name: target for name, target in _BLOCK.items() if name not in ("attn_norm", "ffn_norm")},
    **_QK_NORM,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """block: tensor names inside a layer. interleaved_qk: llama.cpp reordered q and k rows for its own rotation.
    unit_offset: the file stores 1 + the norm weights that transformers stores."""

    model_type: str
    block: dict[str, str]
    interleaved_qk: bool = False
    unit_offset: bool = False


LAYOUTS: dict[str, Layout] = {
    "llama": Layout("llama", _BLOCK, interleaved_qk=True),
    "qwen2": Layout("qwen2", _BLOCK),
    "qwen3": Layout("qwen3", {**_BLOCK, **_QK_NORM}),
    "gemma": Layout("gemma", _BLOCK, unit_offset=True),
    "gemma2": Layout("gemma2", _GEMMA_BLOCK, unit_offset=True),
    "gemma3": Layout("gemma3_text", {**_GEMMA_BLOCK, **_QK_NORM}, unit_offset=True),
    "phi3": Layout("phi3", _PHI3_BLOCK),
    "olmo2": Layout("olmo2", _OLMO2_BLOCK),
    "granite": Layout("granite", _BLOCK, interleaved_qk=True),
    "smollm3": Layout("smollm3", _BLOCK, interleaved_qk=True),
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
