"""Holds a drafter's tensors against its layout, and its needs against the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.checkpoints.drafters.errors import DrafterError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from engine.batch import ModelSpec
    from engine.checkpoints.drafters.specs import BlockSpec, EagleSpec, TargetNeeds

Shapes = dict[str, tuple[int, ...]]
_SHOWN = 6


def check_tensors(tensors: dict[str, torch.Tensor], required: Shapes, optional: Shapes, layout: str) -> None:
    """Raises DrafterError with the names of what is missing, left over or mis-shaped."""
    if missing := required.keys() - tensors.keys():
        raise DrafterError(f"the checkpoint lacks {_listed(missing)}, which layout {layout} needs")
    known = required | optional
    if unused := tensors.keys() - known.keys():
        raise DrafterError(f"the checkpoint has tensors that layout {layout} does not use: {_listed(unused)}")
    wrong = [f"{name} {tuple(tensor.shape)}, expected {known[name]}" for name, tensor in tensors.items() if tensor.shape != known[name]]
    if wrong:
        raise DrafterError(f"the checkpoint has tensors of another shape than its config says: {_listed(wrong)}")


def check_target(needs: TargetNeeds, taps: tuple[int, ...], spec: ModelSpec) -> None:
    """Raises DrafterError saying in what the target differs from the one that the drafter was made for."""
    made_for = f"a drafter made for {needs.name}" if needs.name else "this drafter"
    pairs = (("hidden size", needs.hidden_size, spec.hidden_size), ("layers", needs.num_layers, spec.num_layers))
    for what, wanted, found in pairs:
        if wanted is not None and wanted != found:
            raise DrafterError(
                f"{made_for} needs a target with {wanted} {what}, but {spec.name} has {found}; choose one made for {spec.name}"
            )
    if needs.vocab_size != spec.vocab_size:
        raise DrafterError(
            f"{made_for} has a vocabulary of {needs.vocab_size} tokens, but {spec.name} one of {spec.vocab_size}: its token numbers mean "
            f"something else here; choose one made for {spec.name}"
        )
    if beyond := [tap for tap in taps if not 0 <= tap <= spec.num_layers]:
        raise DrafterError(f"{made_for} reads hidden state {beyond[0]}, but {spec.name} has {spec.num_layers} layers")


def block_shapes(spec: BlockSpec) -> tuple[Shapes, Shapes]:
    """(required, optional) tensors of a DSpark or DFlash drafter, by DeepSpec's names, which all its layouts share."""
    layers, vocab = spec.layers, spec.needs.vocab_size
    hidden, rank = layers.hidden_size, spec.markov_rank
    shapes: Shapes = {
        "fc.weight": (hidden, len(spec.taps) * spec.needs.hidden_size),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for index in range(layers.num_layers):
        shapes |= layer_shapes(spec, f"layers.{index}.", hidden)
    if rank:
        shapes |= {"markov_head.markov_w1.weight": (vocab, rank), "markov_head.markov_w2.weight": (spec.draft_vocab_size, rank)}
    if rank and spec.markov_type == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, hidden + rank), "markov_head.gate_proj.bias": (rank,)}
    if rank and spec.markov_type == "rnn":
        shapes |= {"markov_head.joint_proj.weight": (3 * rank, 2 * rank + hidden), "markov_head.joint_proj.bias": (3 * rank,)}
    if spec.confidence:
        width = hidden + (rank if spec.confidence_with_markov else 0)
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    may = {
        "embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (spec.draft_vocab_size, hidden),
        "d2t": (spec.draft_vocab_size,),
        "t2d": (vocab,),
        "verifier_norm.weight": (hidden,),
        "verifier_lm_head.weight": (spec.draft_vocab_size, hidden),
    }
    speculators = spec.format.startswith("speculators")
    optional = {name: shape for name, shape in may.items() if speculators or (spec.format == "deepspec" and name in _FROZEN)}
    required = shapes | {name: may[name] for name in spec.stored}
    return required, optional


def eagle_shapes(spec: EagleSpec) -> tuple[Shapes, Shapes]:
    """(required, optional) tensors of an EAGLE-3 head, by its own layout's names."""
    layers, vocab = spec.layers, spec.needs.vocab_size
    hidden, wide = layers.hidden_size, len(spec.taps) * spec.target_hidden_size
    shapes: Shapes = {"fc.weight": (hidden, wide), "norm.weight": (hidden,), "lm_head.weight": (spec.draft_vocab_size, hidden)}
    for index in range(layers.num_layers):
        prefix = f"{spec.prefix}." if spec.prefix else f"layers.{index}."
        fused = index == 0 or spec.all_fused
        shapes |= layer_shapes(spec, prefix, 2 * hidden if fused else hidden)
        if fused:
            shapes[f"{prefix}hidden_norm.weight"] = (hidden,)
    if spec.norm_before_fc:
        shapes["input_norm.weight"] = (wide,)
    optional: Shapes = {"t2d": (vocab,)}
    if spec.draft_vocab_size != vocab:
        shapes["d2t"] = (spec.draft_vocab_size,)
    else:
        optional["d2t"] = (spec.draft_vocab_size,)
    (shapes if spec.own_embedding else optional)["embed_tokens.weight"] = (vocab, hidden)
    if spec.format.startswith("speculators"):
        optional |= {"verifier_norm.weight": (hidden,), "verifier_lm_head.weight": (spec.draft_vocab_size, hidden)}
    return shapes, optional


_FROZEN = ("embed_tokens.weight", "lm_head.weight")


def layer_shapes(spec: BlockSpec | EagleSpec, prefix: str, width: int) -> Shapes:
    """One transformer layer whose attention reads `width` numbers a token."""
    layers = spec.layers
    hidden, inner = layers.hidden_size, layers.intermediate_size
    q, kv = layers.num_heads * layers.head_dim, layers.num_kv_heads * layers.head_dim
    outputs = {"q_proj": q, "k_proj": kv} | ({} if layers.keys_are_values else {"v_proj": kv})
    norms = ["input_layernorm", "post_attention_layernorm"]
    if layers.sandwich:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: Shapes = {f"{prefix}{name}.weight": (hidden,) for name in norms}
    shapes |= {f"{prefix}self_attn.{name}.weight": (size, width) for name, size in outputs.items()}
    shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, q)
    if layers.attention_bias:
        shapes |= {f"{prefix}self_attn.{name}.bias": (size,) for name, size in (outputs | {"o_proj": hidden}).items()}
    if layers.qk_norm:
        shapes |= {f"{prefix}self_attn.{name}.weight": (layers.head_dim,) for name in ("q_norm", "k_norm")}
    shapes |= {f"{prefix}mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
    shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
    if layers.sandwich:
        shapes[f"{prefix}layer_scalar"] = (1,)
    return shapes


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
