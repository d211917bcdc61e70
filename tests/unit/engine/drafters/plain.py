"""Drafters' forward passes as the papers write them: one text, everything computed anew, loops instead of batches."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

Tensors = dict[str, torch.Tensor]


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """x: [T, heads, head_dim]."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None].float() * theta ** (-torch.arange(half).float() / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def project(t: Tensors, prefix: str, name: str, x: torch.Tensor, heads: int, positions: torch.Tensor | None) -> torch.Tensor:
    out = functional.linear(x, t[f"{prefix}self_attn.{name}_proj.weight"]).view(len(x), heads, -1)
    norm = t.get(f"{prefix}self_attn.{name}_norm.weight")
    out = out if norm is None else rms(out, norm)
    return out if positions is None else rope(out, positions)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """q: [T, heads, d]; k, v: [L, kv_heads, d]; seen: bool [T, L]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def mlp(t: Tensors, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
    x = rms(hidden, t[f"{prefix}post_attention_layernorm.weight"])
    gate, up = (functional.linear(x, t[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    gate, up = (functional.linear(x, t[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    inner = functional.silu(gate) * up
    return hidden + functional.linear(inner, t[f"{prefix}mlp.down_proj.weight"])


def block_hidden(
    t: Tensors, features: list[torch.Tensor], embedded: torch.Tensor, windows: list[int | None], heads: tuple[int, int]
) -> torch.Tensor:
    """DSpark's backbone (eq. 2, 3): embedded [G, hidden] stands after the context. features: taps, [context, hidden] each."""
    context = rms(functional.linear(torch.cat(features, -1), t["fc.weight"]), t["hidden_norm.weight"])
    before, slots = len(context), len(embedded)
    at_context, at_block = torch.arange(before), torch.arange(before, before + slots)
    hidden = embedded
    for index, window in enumerate(windows):
        prefix = f"layers.{index}."
        x = rms(hidden, t[f"{prefix}input_layernorm.weight"])
        q = project(t, prefix, "q", x, heads[0], at_block)
        k = torch.cat((project(t, prefix, "k", context, heads[1], at_context), project(t, prefix, "k", x, heads[1], at_block)))
        v = torch.cat((project(t, prefix, "v", context, heads[1], None), project(t, prefix, "v", x, heads[1], None)))
        place = torch.cat((at_context, at_block))
        apart = at_block[:, None] - place
        seen = torch.ones_like(apart, dtype=torch.bool) if window is None else (apart < window) & (apart >= 0)
        hidden = hidden + functional.linear(attend(q, k, v, seen), t[f"{prefix}self_attn.o_proj.weight"])
        hidden = mlp(t, prefix, hidden)
    return rms(hidden, t["norm.weight"])


def sequential(
    t: Tensors, config: dict[str, Any], base: torch.Tensor, hidden: torch.Tensor, anchor: int
) -> tuple[list[int], list[float], list]:
    """Eq. 5 to 7, greedily: (tokens, confidences, logits) of the slots [K]. base: [K, vocab]."""
    rank, kind = config["markov_rank"], config["markov_head_type"]
    state = torch.zeros(rank)
    previous, tokens, confidences, all_logits = anchor, [], [], []
    for u, h in zip(base, hidden, strict=True):
        e = t["markov_head.markov_w1.weight"][previous] if rank else torch.zeros(0)
        latent = e
        if rank and kind == "gated":
            gate = t["markov_head.gate_proj.weight"] @ torch.cat((h, e)) + t["markov_head.gate_proj.bias"]
            latent = gate.sigmoid() * e
        if rank and kind == "rnn":
            joint = t["markov_head.joint_proj.weight"] @ torch.cat((state, e, h)) + t["markov_head.joint_proj.bias"]
            g, c, o = joint[:rank].sigmoid(), joint[rank : 2 * rank].tanh(), joint[2 * rank :].tanh()
            state, latent = g * state + (1 - g) * c, o
        logits = u + t["markov_head.markov_w2.weight"] @ latent if rank else u
        confidences.append(float((t["confidence_head.proj.weight"][0] @ torch.cat((h, e)) + t["confidence_head.proj.bias"][0]).sigmoid()))
        previous = int(logits.argmax())
        tokens.append(previous)
        all_logits.append(logits)
    return tokens, confidences, all_logits


def eagle_chain(
    t: Tensors,
    prefixes: list[str],
    features: torch.Tensor,
    tokens: list[int],
    embed: torch.Tensor,
    heads: tuple[int, int],
    count: int,
    *,
    seen: list[int] | None = None,
    **how: bool,
) -> list[int]:
    """EAGLE-3 greedily. features: fused taps [context, hidden] of all positions but the last token's; tokens: the whole text.

    seen: the positions that there are for the head, None: all.
    """
    places = list(range(len(features))) if seen is None else list(seen)
    given = [tokens[position + 1] for position in places]
    rows = [functional.linear(features[position], t["fc.weight"]) for position in places]
    drafts: list[int] = []
    ids = torch.arange(len(t["lm_head.weight"])) + t.get("d2t", 0)
    while len(drafts) < count:
        # Every pass reads the whole text anew, with the head's own features where the target's end.
        hidden, embedded = torch.stack(rows), embed[torch.tensor(given)]
        place = torch.tensor(places)
        for prefix in prefixes:
            f = rms(hidden, t[f"{prefix}hidden_norm.weight"])
            residual = f if how.get("norm_before_residual") else hidden
            x = torch.cat((rms(embedded, t[f"{prefix}input_layernorm.weight"]), f), -1)
            q, k = (project(t, prefix, name, x, size, place) for name, size in (("q", heads[0]), ("k", heads[1])))
            v = project(t, prefix, "v", x, heads[1], None)
            before = place[:, None] >= place
            hidden = mlp(t, prefix, residual + functional.linear(attend(q, k, v, before), t[f"{prefix}self_attn.o_proj.weight"]))
        logits = t["lm_head.weight"] @ rms(hidden[-1], t["norm.weight"])
        drafts.append(int(ids[logits.argmax()]))
        rows.append(hidden[-1])
        given.append(drafts[-1])
        places.append(places[-1] + 1)
    return drafts
