"""The trainable DSpark drafter: the same equations as `engine.drafters.dspark`, over many anchors of several texts, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from engine.checkpoints.drafters.check import block_shapes
from engine.drafters.parts.layers import read_rope

if TYPE_CHECKING:
    from engine.checkpoints.drafters.specs import BlockSpec


class BlockModule(nn.Module):
    """Parameters carry DeepSpec's tensor names (dots become slashes inside torch). Embedding and output head are the target's, frozen."""

    def __init__(self, spec: BlockSpec, seed: int = 0, device: torch.device | None = None) -> None:
        """Initial weights depend on the seed alone, not on the device."""
        super().__init__()
        self.spec = spec
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterDict()
        required, _ = block_shapes(spec)
        for name, shape in required.items():
            if name not in spec.stored:
                self.weights[_key(name)] = nn.Parameter(_initial(name, shape, generator))
        self.to(device)
        self._rope = read_rope(spec.layers, device or torch.device("cpu"))

    def forward(self, taps: torch.Tensor, embedded: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Normalised hidden states [B, A, G, hidden], float32, of blocks at `anchors` [B, A] over texts whose taps are [B, T, n * hidden].

        embedded: [B, A, G, hidden], each anchor's embedding and the mask's. A block sees its text's features before its anchor, and
        itself; what a text shorter than T is filled up with is seen by none.
        """
        spec = self.spec.layers
        texts, count, slots, _ = embedded.shape
        index = torch.arange(taps.shape[1], device=taps.device)
        context = self._norm("hidden_norm.weight", functional.linear(taps, self._w("fc.weight")))
        positions = (anchors[..., None] + torch.arange(slots, device=anchors.device)).reshape(-1)
        at_context = self._rope.angles(index, torch.float32)
        cos, sin = self._rope.angles(positions, torch.float32)
        at_block = cos.view(texts, count * slots, -1), sin.view(texts, count * slots, -1)
        unseen = index >= anchors.repeat_interleave(slots, 1)[..., None]
        hidden = embedded.reshape(texts, count * slots, -1)
        for layer in range(spec.num_layers):
            prefix = f"layers.{layer}."
            x = self._norm(f"{prefix}input_layernorm.weight", hidden)
            q = self._heads(prefix, "q", x, at_block)
            of_context = self._heads(prefix, "k", context, at_context), self._heads(prefix, "v", context, None)
            of_block = self._heads(prefix, "k", x, at_block), self._heads(prefix, "v", x, None)
            out = _attend(q, of_context, of_block, unseen, slots)
            hidden = hidden + functional.linear(out.flatten(2), self._w(f"{prefix}self_attn.o_proj.weight"))
            x = self._norm(f"{prefix}post_attention_layernorm.weight", hidden)
            gate, up = (functional.linear(x, self._w(f"{prefix}mlp.{name}_proj.weight")) for name in ("gate", "up"))
            hidden = hidden + functional.linear(functional.silu(gate) * up, self._w(f"{prefix}mlp.down_proj.weight"))
        return self._norm("norm.weight", hidden).view(texts, count, slots, -1)

    def sequential(
        self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor, columns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher-forced logits [A, G, vocab] and confidence logits [A, G]. previous: int64 [A, G], the token before each slot's own.

        columns: int64 [C], the tokens that `logits` are of; None: the whole vocabulary.
        """
        spec, embedding = self.spec, None
        if spec.markov_rank:
            embedding = functional.embedding(previous, self._w("markov_head.markov_w1.weight"))
            rows = self._w("markov_head.markov_w2.weight")
            rows = rows if columns is None else rows.index_select(0, columns)
            logits = logits + functional.linear(self._latent(embedding, hidden), rows)
        if not spec.confidence:
            return logits, None
        features = torch.cat((hidden, embedding), -1) if spec.confidence_with_markov and embedding is not None else hidden
        score = functional.linear(features, self._w("confidence_head.proj.weight"), self._w("confidence_head.proj.bias"))
        return logits, score.squeeze(-1)

    @torch.no_grad()
    def start_from(self, target: dict[str, torch.Tensor]) -> None:
        """Begins as the target ends: its last layers where they have this shape, its final norm, and its last tapped state as context.

        target: tensors of its checkpoint by transformers' names. What does not fit keeps its random start.
        """
        known = {name.removeprefix("model."): tensor for name, tensor in target.items()}
        first = max((int(name.split(".")[1]) for name in known if name.startswith("layers.")), default=-1) + 1 - self.spec.layers.num_layers
        pairs = {"norm.weight": "norm.weight", "hidden_norm.weight": f"layers.{first}.input_layernorm.weight"}
        for key in self.weights:
            name = key.replace("/", ".")
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                pairs[name] = f"layers.{first + int(index)}.{rest}"
        for name, source in pairs.items():
            if source in known and known[source].shape == self._w(name).shape:
                self._w(name).copy_(known[source])
        fc = self._w("fc.weight")
        if fc.shape[1] % len(fc) == 0:
            fc.mul_(0.1)[:, -len(fc) :].add_(torch.eye(len(fc), device=fc.device))

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """By DeepSpec's names, all of them."""
        for key, parameter in self.weights.items():
            parameter.copy_(tensors[key.replace("/", ".")])

    def tensors(self) -> dict[str, torch.Tensor]:
        """By DeepSpec's names."""
        return {key.replace("/", "."): parameter.detach() for key, parameter in self.weights.items()}

    def _latent(self, embedding: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self.spec.markov_type == "vanilla":
            return embedding
        if self.spec.markov_type == "gated":
            mixed = functional.linear(
                torch.cat((hidden, embedding), -1), self._w("markov_head.gate_proj.weight"), self._w("markov_head.gate_proj.bias")
            )
            return embedding * torch.sigmoid(mixed)
        state, found = torch.zeros_like(embedding[:, 0]), []
        for slot in range(embedding.shape[1]):
            z = torch.cat((state, embedding[:, slot], hidden[:, slot]), -1)
            joint = functional.linear(z, self._w("markov_head.joint_proj.weight"), self._w("markov_head.joint_proj.bias")).float()
            gate, candidate, out = joint.chunk(3, -1)
            state = torch.lerp(torch.tanh(candidate), state, torch.sigmoid(gate))
            found.append(torch.tanh(out))
        return torch.stack(found, 1)

    def _heads(self, prefix: str, name: str, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        rows = functional.linear(x, self._w(f"{prefix}self_attn.{name}_proj.weight")).unflatten(-1, (-1, self.spec.layers.head_dim))
        if angles is None:
            return rows
        rows = self._norm(f"{prefix}self_attn.{name}_norm.weight", rows)
        cos, sin = (angle.unsqueeze(-2) for angle in angles)
        return rows * cos + rows.roll(rows.shape[-1] // 2, -1) * sin

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self._w(name)
        return functional.rms_norm(x.float(), weight.shape, weight, self.spec.layers.norm_eps)

    def _w(self, name: str) -> torch.Tensor:
        return self.weights[_key(name)]


def _attend(
    q: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor],
    block: tuple[torch.Tensor, torch.Tensor],
    unseen: torch.Tensor,
    slots: int,
) -> torch.Tensor:
    """[B, A * G, heads, dim]: every row over the context it sees and its own block. Keys and values are [B, T or A * G, kv heads, dim].

    unseen: bool [B, A * G, T]. Blocks do not see each other, so their scores are only computed within each.
    """
    texts, rows, heads, width = q.shape
    kv_heads = block[0].shape[2]
    grouped = q.view(texts, rows, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)  # [B, kv, repeat, rows, dim]
    keys, values = (tensor.transpose(1, 2).unsqueeze(2) for tensor in context)  # [B, kv, 1, T, dim]
    own_keys, own_values = (tensor.view(texts, -1, slots, kv_heads, width).permute(0, 3, 1, 2, 4).unsqueeze(2) for tensor in block)
    by_block = grouped.unflatten(3, (-1, slots))  # [B, kv, repeat, A, G, dim]
    far = (grouped @ keys.transpose(-1, -2)).masked_fill(unseen[:, None, None], float("-inf"))
    near = (by_block @ own_keys.transpose(-1, -2)).flatten(3, 4)
    weights = torch.softmax(torch.cat((far, near), -1) * width**-0.5, -1, dtype=torch.float32)
    of_far, of_near = weights.split((far.shape[-1], slots), -1)
    out = of_far @ values.to(of_far.dtype) + (of_near.unflatten(3, (-1, slots)) @ own_values.to(of_near.dtype)).flatten(3, 4)
    return out.permute(0, 3, 1, 2, 4).reshape(texts, rows, heads, width)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms one, biases and the sequential head's output zero (a block begins as DFlash's), everything else normal, 0.02."""
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("bias") or name.endswith("markov_w2.weight"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * 0.02
