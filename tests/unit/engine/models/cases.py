"""The tiny models that every test of families goes through: (model type, config values). Prompts of 23 tokens outgrow every window."""

from __future__ import annotations

from typing import Any

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.5],
    "long_factor": [4.0, 5.0],
}
_SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

LEAN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "llama, yarn rope": ("llama", {"rope_parameters": _YARN}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "layer_types": _SLIDING}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 20, "layer_types": _SLIDING, "rope_parameters": GEMMA3_ROPE}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False}),
}
"""On the lean decoder."""

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FALLBACK: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 6, "head_dim": None}),
    "gpt-neox": ("gpt_neox", {"head_dim": None}),
    "starcoder2": ("starcoder2", {"sliding_window": 6, "head_dim": None}),
    "cohere2": ("cohere2", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48, "head_dim": None}),
    "phi": ("phi", {"head_dim": None, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "olmo": ("olmo", {"head_dim": None, "clip_qkv": 1.0}),
    "olmo3": ("olmo3", {"head_dim": None, "sliding_window": 6}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4, **_EXPERTS}),
    "qwen3-moe, some layers dense": ("qwen3_moe", {"num_experts": 4, "mlp_only_layers": [1], "norm_topk_prob": True, **_EXPERTS}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
}
"""On transformers' own code."""
