"""Small random drafter checkpoints, each written exactly in one published layout, and tiny targets for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from engine.batch import TargetModel
from engine.drafters.base import Host, Progress
from engine.drafters.parts.places import slots_of
from engine.scheduler import Chunk
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer
from engine.types import Request, SamplingParams
from tests.unit.engine.models.tiny import BLOCK_SIZE, LENGTHS, Texts

HIDDEN, VOCAB, LAYERS, MASK = 48, 101, 4, 99
INNER, HEADS, KV_HEADS, HEAD_DIM = 64, 6, 2, 8
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "model_type": "qwen3",
}
Tensors = dict[str, torch.Tensor]
Checkpoint = tuple[dict[str, Any], Tensors]


class Shapes:
    """Draws random tensors by name; norms are near one, everything else large enough to matter."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def add(self, name: str, *shape: int) -> None:
        values = torch.randn(shape, generator=self._generator)
        self.tensors[name] = 1.0 + 0.3 * values if "norm" in name else 0.3 * values

    def layer(self, prefix: str, width: int = HIDDEN, *, qk_norm: bool = True) -> None:
        sizes = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
        for name, size in sizes.items():
            self.add(f"{prefix}self_attn.{name}.weight", size, width)
        self.add(f"{prefix}self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM)
        if qk_norm:
            self.add(f"{prefix}self_attn.q_norm.weight", HEAD_DIM)
            self.add(f"{prefix}self_attn.k_norm.weight", HEAD_DIM)
        self.add(f"{prefix}mlp.gate_proj.weight", INNER, HIDDEN)
        self.add(f"{prefix}mlp.up_proj.weight", INNER, HIDDEN)
        self.add(f"{prefix}mlp.down_proj.weight", HIDDEN, INNER)
        self.add(f"{prefix}input_layernorm.weight", HIDDEN)
        self.add(f"{prefix}post_attention_layernorm.weight", HIDDEN)

    def backbone(self, taps: int) -> None:
        self.add("fc.weight", HIDDEN, taps * HIDDEN)
        self.add("hidden_norm.weight", HIDDEN)
        self.add("norm.weight", HIDDEN)
        for index in range(2):
            self.layer(f"layers.{index}.")

    def heads(self, kind: str, rank: int, draft_vocab: int = VOCAB, *, confidence: bool = True) -> None:
        if rank:
            self.add("markov_head.markov_w1.weight", VOCAB, rank)
            self.add("markov_head.markov_w2.weight", draft_vocab, rank)
        if rank and kind == "gated":
            self.add("markov_head.gate_proj.weight", rank, HIDDEN + rank)
            self.add("markov_head.gate_proj.bias", rank)
        if rank and kind == "rnn":
            self.add("markov_head.joint_proj.weight", 3 * rank, 2 * rank + HIDDEN)
            self.add("markov_head.joint_proj.bias", 3 * rank)
        if confidence:
            self.add("confidence_head.proj.weight", 1, HIDDEN + rank)
            self.add("confidence_head.proj.bias", 1)


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def deepspec(target: TargetModel, kind: str = "vanilla", rank: int = 8, *, block: int = 5, **changes: Any) -> Checkpoint:
    """DSpark's own layout; rank 0 is DFlash."""
    shapes = Shapes()
    shapes.backbone(2)
    shapes.heads(kind, rank)
    frozen = target.frozen()
    shapes.tensors["embed_tokens.weight"] = frozen.embedding.clone()
    shapes.tensors["lm_head.weight"] = head_weight(target)
    config = SIZES | {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": LAYERS,
        "block_size": block,
        "mask_token_id": MASK,
        "target_layer_ids": [-1, 2],
        "markov_rank": rank,
        "markov_head_type": kind,
        "enable_confidence_head": True,
        "confidence_head_with_markov": rank > 0,
        "layer_types": ["full_attention"] * 2,
    }
    return config | changes, shapes.tensors


def zlab(**changes: Any) -> Checkpoint:
    """z-lab's DFlash: no embedding, no head; the second layer has a window."""
    shapes = Shapes(1)
    shapes.backbone(2)
    config = SIZES | {
        "architectures": ["DFlashDraftModel"],
        "block_size": 5,
        "num_target_layers": LAYERS,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 6,
        "dflash_config": {"target_layer_ids": [0, 2], "mask_token_id": MASK},
    }
    return config | changes, shapes.tensors


def speculators_block(kind: str, *, draft_vocab: int = 60, **changes: Any) -> Checkpoint:
    """vLLM speculators' dspark (with heads) or dflash, over a reduced vocabulary."""
    shapes = Shapes(2)
    shapes.backbone(2)
    spark = kind == "dspark"
    if spark:
        shapes.heads("vanilla", 8, draft_vocab)
    shapes.add("lm_head.weight", draft_vocab, HIDDEN)
    kept = torch.arange(draft_vocab) * VOCAB // draft_vocab
    shapes.tensors["d2t"] = kept - torch.arange(draft_vocab)
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[kept] = True
    shapes.tensors["t2d"] = mask
    config = {
        "architectures": ["DSparkSpeculator" if spark else "DFlashSpeculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.4.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
            "verifier": {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]},
        },
        "transformer_layer_config": SIZES,
        "draft_vocab_size": draft_vocab,
        "block_size": 5,
        "mask_token_id": MASK,
        "aux_hidden_state_layer_ids": [1, 3],
    }
    if spark:
        config |= {"markov_rank": 8, "markov_head_type": "vanilla", "enable_confidence_head": True, "confidence_head_with_markov": True}
    return config | changes, shapes.tensors


BLOCK_LAYOUTS = ("dspark", "gated", "dflash", "small")


def write_blocks(root: Path, target: TargetModel) -> Path:
    """A folder with a drafter of each kind: with a Markov head, a gated one, none and a window, and over a vocabulary of its own."""
    write(root / "dspark", *deepspec(target))
    write(root / "gated", *deepspec(target, "gated"))
    write(root / "dflash", *zlab())
    write(root / "small", *speculators_block("dspark"))
    for name in ("gated", "dflash"):  # bins by how sharp a draft is, differently at each position and temperature
        scales = {"temperatures": [1.5, 0.7], "offsets": [0.3, -0.4, 0.1], "sharpness": [0.5, 2.0, 1.0]}
        calibration = {key: {bucket: [value + 0.1 * int(bucket) for value in row] for bucket in "02"} for key, row in scales.items()}
        (root / name / "calibration.json").write_text(json.dumps(calibration))
    return root


def head_weight(target: TargetModel) -> torch.Tensor:
    """The target's output head [vocab, hidden], read through its own product."""
    return target.frozen().head(torch.eye(target.spec.hidden_size)).T.contiguous()


class Scene:
    """A target with three texts in its cache, as an engine would have left them, and a host for drafters."""

    def __init__(self, target: TargetModel, *, texts: Texts | None = None, sampling: SamplingParams | None = None) -> None:
        self.target = target
        self.texts = texts or Texts.random(VOCAB)
        self.pool = self.texts.pool(target.spec)
        tokenizer = Tokenizer(SimpleNamespace())
        self.host = Host(target, tokenizer, None, self.pool.num_blocks, BLOCK_SIZE, 8, 5)
        params = sampling or SamplingParams(max_tokens=40, temperature=0.0)
        self.sequences = []
        for serial, tokens in enumerate(self.texts.tokens):
            sequence = Sequence(Request(str(serial), tuple(tokens.tolist()), params), serial, 64)
            sequence.blocks = self.texts.tables[serial].tolist()
            sequence.slot = serial
            self.sequences.append(sequence)

    def feed(self, drafter: Any, steps: list[list[tuple[int, int, int]]], *, seen: bool = True) -> None:
        """Runs spans (text, start, end) through the target, and lets the drafter see (or miss) all their rows as confirmed."""
        for spans in steps:
            batch = self.texts.step(spans, drafter.taps)
            out = self.target.forward(batch, self.pool)
            counts = np.array([end - start for _, start, end in spans], np.int64)
            chunks = [Chunk(self.sequences[text], start, end - start) for text, start, end in spans]
            progress = Progress(chunks, batch.query_start.numpy(), counts, batch.positions.numpy(), batch.slots.numpy(), out.taps)
            if seen:
                drafter.observe(progress)
            else:
                drafter.miss(progress)
            for text, _, end in spans:
                self.sequences[text].num_computed = end
                self.sequences[text].decoding = True


PARTED = 6
"""Tokens that the first two of `parted`'s texts have in common."""


def parted() -> Texts:
    """`Texts.random`, of which the first two part inside a block."""
    texts = Texts.random(VOCAB)
    texts.tokens[1][:PARTED] = texts.tokens[0][:PARTED]
    return texts


def copy_beginning(scene: Scene) -> NDArray[np.int64]:
    """Copies the KV of what the first text has in common with the second to that; int64 [2, PARTED], from where to where."""
    slots = np.stack([slots_of(sequence, np.arange(PARTED), BLOCK_SIZE) for sequence in scene.sequences[:2]])
    scene.pool.copy(*torch.from_numpy(slots))
    return slots


def without_anchors(steps: list[list[tuple[int, int, int]]]) -> list[list[tuple[int, int, int]]]:
    """The spans of `Texts.random`'s three texts without the last token of each, which stays to be computed: a draft's anchor."""
    cut = [[(text, start, min(end, LENGTHS[text] - 1)) for text, start, end in spans] for spans in steps]
    return [[span for span in spans if span[2] > span[1]] for spans in cut]


def eagle(layout: str, *, draft_vocab: int = 60, **changes: Any) -> Checkpoint:
    """EAGLE-3: `original` (midlayer, reduced vocabulary), `deepspec` (two fused layers, five taps) or `speculators`."""
    shapes = Shapes(3)
    deep = layout == "deepspec"
    taps = 5 if deep else 3
    shapes.add("fc.weight", HIDDEN, taps * HIDDEN)
    shapes.add("norm.weight", HIDDEN)
    prefixes = {"original": ["midlayer."], "deepspec": ["layers.0.", "layers.1."], "speculators": ["layers.0."]}[layout]
    for prefix in prefixes:
        shapes.layer(prefix, 2 * HIDDEN, qk_norm=deep)
        shapes.add(f"{prefix}hidden_norm.weight", HIDDEN)
    vocab = VOCAB if deep else draft_vocab
    shapes.add("lm_head.weight", vocab, HIDDEN)
    if not deep:
        kept = torch.arange(draft_vocab) * VOCAB // draft_vocab
        shapes.tensors["d2t"] = kept - torch.arange(draft_vocab)
        shapes.tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, kept, True)
    llama = SIZES | {"model_type": "llama", "num_hidden_layers": 1}
    config: dict[str, Any]
    if layout == "original":
        config = llama | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": draft_vocab}
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True}
    elif deep:
        config = SIZES | {
            "architectures": ["Qwen3Eagle3Model"],
            "num_target_layers": LAYERS,
            "target_layer_ids": [0, 1, 2],
            "ttt_length": 7,
        }
        shapes.add("fc.weight", HIDDEN, 3 * HIDDEN)
    else:
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3", "proposal_methods": [], "verifier": {"name_or_path": "org/target"}},
            "transformer_layer_config": llama,
            "draft_vocab_size": draft_vocab,
            "norm_before_residual": True,
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        }
    return config | changes, shapes.tensors
