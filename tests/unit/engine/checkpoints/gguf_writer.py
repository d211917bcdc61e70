"""Writes tiny GGUF files as llama.cpp's converter would."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
LLAMA_NORMS = {"post_attention_layernorm": "ffn_norm"}
SANDWICH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FUSED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
WITH_SANDWICH_NORMS = ("gemma2", "gemma3", "olmo2")
WITH_OFFSET_NORMS = ("gemma", "gemma2", "gemma3")
ROTATING_NEIGHBOURS = ("llama", "granite", "smollm3")
"""llama.cpp rotates neighbouring pairs in these, so that its converter reorders the rows of queries and keys."""
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(
    path: Path,
    hf: Any,
    architecture: str,
    *,
    pre: str = "smollm",
    skip: str = "",
    extra: bool = False,
    quantised: gguf.GGMLQuantizationType | None = None,
    chat: bool = True,
) -> Path:
    """`skip` leaves out tensors whose GGUF name contains it; `extra` adds one that no model has; matrices are stored `quantised`."""
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, hf.config, architecture)
    _write_tokenizer(writer, hf.config.vocab_size, pre, chat)
    for name, tensor in hf.state_dict().items():
        if hf.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        values = _as_llama_cpp(name, tensor.numpy(), hf.config, architecture)
        target = _gguf_name(name, SANDWICH_NORMS if architecture in WITH_SANDWICH_NORMS else LLAMA_NORMS)
        if skip and skip in target:
            continue
        values = np.ascontiguousarray(values)
        if quantised is not None and values.ndim > 1:
            writer.add_tensor(target, gguf.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(target, values)
    for name, factors in _rope_factors(hf.config).items():
        writer.add_tensor(f"{name}.weight", np.array(factors, np.float32))
    if extra:
        writer.add_tensor("blk.0.attn_mystery.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if architecture not in ("phi3", "granite"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if original := rope.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _rope_factors(config: Any) -> dict[str, list[float]]:
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return {}
    return {"rope_factors_long": rope["long_factor"], "rope_factors_short": rope["short_factor"]}


def _write_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, pre: str, chat: bool) -> None:
    """All byte symbols that fit after the specials, and one merge."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet())]
    tokens = [*tokens[: vocab_size - 1], "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (vocab_size - len(SPECIALS)))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if chat:
        writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")


def _gguf_name(name: str, norms: dict[str, str]) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        index, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{index}.{(NAMES | FUSED | norms)[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def _as_llama_cpp(name: str, values: np.ndarray, config: Any, architecture: str) -> np.ndarray:
    if architecture in WITH_OFFSET_NORMS and "norm" in name:
        return values + 1
    if architecture in ROTATING_NEIGHBOURS and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values
