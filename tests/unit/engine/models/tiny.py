"""Tiny random models of real families, and packed steps over several sequences at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.batch import ForwardBatch, ModelSpec, TargetModel
from engine.checkpoints.loader import build_lean
from engine.kv_pool import KVPool
from engine.models.families import max_positions

BLOCK_SIZE = 4
LENGTHS = (23, 9, 14)


def make_hf(model_type: str, **changes: Any) -> Any:
    """A random float32 transformers model with eager attention. Norm weights and biases are random too: ones and zeros hide bugs.

    A change to None takes the value away, for configs that do not know it.
    """
    values: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(model_type, **{name: value for name, value in (values | changes).items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            assert parameter.dtype == torch.float32, name
    return model


CPU = torch.device("cpu")


def make_spec(config: Any, *, num_kv_heads: int, head_dim: int, parameters: int, device: torch.device = CPU) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        revision="0",
        num_layers=config.num_hidden_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
        eos_token_ids=(2,),
        dtype=torch.float32,
        device=device,
        parameter_bytes=4 * parameters,
    )


def make_lean(hf: Any, device: torch.device = CPU) -> TargetModel:
    tied = bool(hf.config.tie_word_embeddings)
    tensors = {name: tensor.clone().to(device) for name, tensor in hf.state_dict().items() if not (tied and name == "lm_head.weight")}
    return build_lean(tensors, hf.config, lambda **shape: make_spec(hf.config, device=device, **shape))


@dataclass(frozen=True)
class Texts:
    """Sequences of unequal lengths with scattered cache blocks."""

    tokens: list[torch.Tensor]
    tables: np.ndarray

    @classmethod
    def random(cls, vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> Texts:
        generator = np.random.default_rng(3)
        width = -(-max(lengths) // BLOCK_SIZE)
        blocks = generator.permutation(np.arange(1, 1 + len(lengths) * width)).reshape(len(lengths), width)
        tokens = [torch.from_numpy(generator.integers(3, vocab_size, length)) for length in lengths]
        return cls(tokens, blocks.astype(np.int32))

    def pool(self, spec: ModelSpec) -> KVPool:
        return KVPool(spec.num_layers, self.tables.size + 1, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.device)

    def step(self, spans: list[tuple[int, int, int]], taps: tuple[int, ...] = ()) -> ForwardBatch:
        """One packed step of (sequence, start, end) spans; logits of every row."""
        counts = [end - start for _, start, end in spans]
        positions = np.concatenate([np.arange(start, end) for _, start, end in spans])
        owners = np.repeat([sequence for sequence, _, _ in spans], counts)
        tables = self.tables[[sequence for sequence, _, _ in spans]]
        slots = self.tables[owners, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        return ForwardBatch(
            token_ids=torch.cat([self.tokens[sequence][start:end] for sequence, start, end in spans]),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            block_tables=torch.from_numpy(tables),
            query_start=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
            kv_lengths=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
            logit_rows=torch.arange(len(positions)),
            max_query=max(counts),
            max_kv=max(end for _, _, end in spans),
            taps=taps,
        )


ONE_SHOT = [[(0, 0, 23), (1, 0, 9), (2, 0, 14)]]
CHUNKED = [
    [(0, 0, 7), (1, 0, 2)],
    [(0, 7, 12), (1, 2, 3), (2, 0, 10)],
    [(0, 12, 13), (1, 3, 4), (2, 10, 11)],
    [(0, 13, 18), (1, 4, 7), (2, 11, 13)],
    [(0, 18, 23), (1, 7, 9), (2, 13, 14)],
]
"""Prefill chunks, single tokens, and draft-like spans of several sequences mixed in one step."""


def run_steps(model: TargetModel, texts: Texts, steps: list[list[tuple[int, int, int]]]) -> list[torch.Tensor]:
    """Logits [length, vocab] of every sequence, gathered over the steps."""
    pool = texts.pool(model.spec)
    parts: list[list[torch.Tensor]] = [[] for _ in texts.tokens]
    for spans in steps:
        logits = model.forward(texts.step(spans), pool).logits
        for (sequence, start, _), rows in zip(spans, logits.split([end - start for _, start, end in spans]), strict=True):
            assert start == sum(len(part) for part in parts[sequence])
            parts[sequence].append(rows)
    return [torch.cat(part) for part in parts]


def reference(hf: Any, texts: Texts) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [hf(input_ids=tokens[None], use_cache=False).logits[0] for tokens in texts.tokens]


def worst_gap(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
