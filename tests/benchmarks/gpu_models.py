"""The models of the GPU benchmarks: Qwen3-8B's shapes and SmolLM2-135M's, with random weights where no checkpoint is at hand."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from engine.batch import ModelSpec, TargetModel
from engine.checkpoints.loader import build_lean
from engine.models.families import max_positions

DRAFT_LAYERS = 5
"""Of the DSpark-shaped drafter."""


@dataclass(frozen=True)
class Loaded:
    model: TargetModel
    tokenizer: Any


class NoText:
    """Tokens are all that is counted."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "x" * len(ids)


def qwen3_config(*, tiny: bool, layers: int | None = None) -> Any:
    from transformers import Qwen3Config

    shape = (64, 96, 2, 4, 2, 16, 300) if tiny else (4096, 12288, 36, 32, 8, 128, 151_936)
    hidden, inner, depth, heads, kv_heads, dim, vocab = shape
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or depth, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, vocab_size=vocab, max_position_embeddings=512 if tiny else 16384,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def smollm2_config() -> Any:
    """SmolLM2-135M's shapes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        vocab_size=49_152, max_position_embeddings=16384, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def config_of(name: str, *, tiny: bool) -> Any:
    """Raises ValueError for a name that is no model of this benchmark."""
    if tiny:
        return qwen3_config(tiny=True)
    if name == "qwen3-8b":
        return qwen3_config(tiny=False)
    if name == "smollm2-135m":
        return smollm2_config()
    raise ValueError(f"{name!r} is not a model of this benchmark: qwen3-8b, smollm2-135m")


def random_model(config: Any, place: torch.device) -> TargetModel:
    """The lean decoder with random weights in the checkpoint's shapes."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = {name: torch.randn(shape, device=place, dtype=dtype) * 0.02 + (len(shape) == 1) for name, shape in shapes.items()}

    def spec(num_kv_heads: int, head_dim: int, parameters: int) -> ModelSpec:
        return ModelSpec(
            "random", "0", config.num_hidden_layers, num_kv_heads, head_dim, config.hidden_size, config.vocab_size,
            max_positions(config), (), dtype, place, parameters * dtype.itemsize,
        )  # fmt: skip

    return build_lean(tensors, config, spec)


def load(name: str, place: torch.device, *, tiny: bool) -> tuple[str, TargetModel, TargetModel | None]:
    """(what it is, model, drafter). The packaged model has none; where it cannot be fetched it has random weights, and its name says so."""
    if name == "smollm2-135m" and not tiny:
        from engine.checkpoints import DEFAULT_MODEL, load_model

        try:
            return DEFAULT_MODEL, load_model(DEFAULT_MODEL, device=str(place)).model, None
        except (OSError, ValueError, RuntimeError) as error:
            sys.stderr.write(f"{DEFAULT_MODEL} cannot be fetched ({error}); random weights in its shapes\n")
            return "smollm2-135m shapes", random_model(config_of(name, tiny=tiny), place), None
    drafter = random_model(qwen3_config(tiny=tiny, layers=1 if tiny else DRAFT_LAYERS), place)
    return ("toy shapes" if tiny else name), random_model(config_of(name, tiny=tiny), place), drafter
