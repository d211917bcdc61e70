"""The sequential head of DSpark (arXiv 2607.05147, eq. 5-7): a bias on a draft block's logits that knows the token drafted before.

    logits_k = U_k + bias(x_{k-1}),   x_0 the anchor

- `vanilla`: bias = W1[x] W2^T (eq. 5).
- `gated`: the embedding W1[x] times sigmoid(G [h_k; W1[x]] + b).
- `rnn` (eq. 6): z = [s; W1[x]; h_k], one joint projection split into gate, candidate and output; s' = g s + (1 - g) tanh(candidate)
  with g = sigmoid(gate), bias = tanh(output) W2^T; s starts at zero in every block.

With W1 = W2 = None the block is drafted from U alone (DFlash).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from kernels.reference.linear import PackedLinear, linear
from kernels.reference.noise import exponential

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["none", "vanilla", "gated", "rnn"]


@dataclass(frozen=True, slots=True)
class SequentialHead:
    """w1: [V, r]; w2: [V_d, r], V_d the drafter's vocabulary. Everything in one dtype. Where a CPU has `packed_w2`, it needs no w2.

    mix_weight, mix_bias: gated [r, H + r], [r]; rnn [3r, 2r + H], [3r] (rows: gate, candidate, output); None for vanilla.
    confidence_weight: [H + r], or [H] where the confidence head does not see the embedding; confidence_bias: [1].
    token_ids: int64 [V_d], the token of each column; None: column = token. packed_w2: w2 in a CPU's layout.
    Raises ValueError for shapes that do not fit each other.
    """

    kind: Kind
    w1: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    mix_weight: torch.Tensor | None = None
    mix_bias: torch.Tensor | None = None
    confidence_weight: torch.Tensor | None = None
    confidence_bias: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    packed_w2: PackedLinear | None = None

    def __post_init__(self) -> None:
        if (self.kind == "none") != (self.w1 is None) or (self.w1 is None) != (self.w2 is None and self.packed_w2 is None):
            raise ValueError(f"a {self.kind!r} head {'has no' if self.kind == 'none' else 'needs both'} w1 and w2")
        if self.w1 is not None and self.w2 is not None and (self.w1.dim() != 2 or self.w1.shape[1] != self.w2.shape[1]):
            raise ValueError(f"w1 and w2 must be [vocabulary, rank] with one rank, got {tuple(self.w1.shape)} and {tuple(self.w2.shape)}")
        needs_mix = self.kind in ("gated", "rnn")
        if needs_mix != (self.mix_weight is not None) or needs_mix != (self.mix_bias is not None):
            raise ValueError(f"a {self.kind!r} head {'needs' if needs_mix else 'has no'} mix_weight and mix_bias")
        if self.mix_weight is not None:
            rows = self.rank * (3 if self.kind == "rnn" else 1)
            if self.mix_weight.shape[0] != rows:
                raise ValueError(f"mix_weight of a {self.kind!r} head of rank {self.rank} has {rows} rows, got {self.mix_weight.shape[0]}")

    @property
    def rank(self) -> int:
        return 0 if self.w1 is None else self.w1.shape[1]

    @property
    def columns(self) -> int | None:
        """V_d, where the head says so."""
        if self.w2 is not None:
            return self.w2.shape[0]
        return None if self.packed_w2 is None else self.packed_w2.out_features


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """tokens: int64 [S, K]. lse: float32 [S, K], log-sum-exp of the tempered logits. confidence: float32 [S, K] or None.

    peak: float32 [S, K], log-probability of the likeliest token under what each token was drawn from. Like the confidence it depends on
    the tokens before, not on the one that was drawn.
    log_weights: [S, K, V_d], the tempered logits (the raw ones of greedy rows), or None where they were not asked for; the
    distribution that was sampled from is exp(log_weights - lse).
    """

    tokens: torch.Tensor
    lse: torch.Tensor
    peak: torch.Tensor
    confidence: torch.Tensor | None
    log_weights: torch.Tensor | None

    def probabilities(self) -> torch.Tensor:
        """[S, K, V_d]: what every token was drawn from. Raises ValueError where the weights were not kept."""
        if self.log_weights is None:
            raise ValueError("the block was drafted without keep_weights=True")
        return torch.exp(self.log_weights - self.lse[..., None])


def sequential_head(
    logits: torch.Tensor,
    hidden: torch.Tensor | None,
    anchors: torch.Tensor,
    head: SequentialHead,
    *,
    temperatures: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    keep_weights: bool = False,
) -> DraftBlock:
    """Drafts K tokens of S sequences one after the other.

    logits: U, [S, K, V_d]. hidden: h, [S, K, H]; needed by gated and rnn heads and by a confidence head. anchors: int64 [S], the last
    confirmed tokens. temperatures: float32 [S], 0 for greedy rows; None: all greedy. keys: int64 [S, K], the noise of each draw
    (`kernels.reference.noise`), needed with temperatures. Raises ValueError naming what is missing.
    """
    check_block(logits, hidden, head, temperatures, keys)
    greedy = None if temperatures is None else temperatures == 0.0
    ids = torch.arange(logits.shape[2], device=logits.device) if head.token_ids is None else head.token_ids
    kept: list[torch.Tensor] = []

    def choose(k: int, embedding: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bias = None if embedding is None else _bias(head, embedding)
        weights = logits[:, k] if bias is None else bias.add_(logits[:, k]) if bias.dtype == logits.dtype else logits[:, k] + bias
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        if greedy is not None and temperatures is not None:
            weights = weights / torch.where(greedy, 1.0, temperatures)[:, None]
        highest, columns = weights.max(1)
        if greedy is not None and keys is not None:
            # argmin of E / p without forming p: the largest of log p - log E.
            columns = torch.where(greedy, columns, (weights - exponential(keys[:, k], ids).log()).argmax(1))
        if keep_weights:
            kept.append(weights)
        return columns, highest, weights.logsumexp(1)

    block = draft(logits.shape[1], hidden, anchors, head, choose)
    return replace(block, log_weights=torch.stack(kept, 1)) if keep_weights else block


def draft(
    count: int,
    hidden: torch.Tensor | None,
    anchors: torch.Tensor,
    head: SequentialHead,
    choose: Callable[[int, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> DraftBlock:
    """`count` drafts one after the other, each taken into the head for the next; without weights.

    choose: draft k and what W2 is multiplied with [S, r] (None for a head without) -> its column int64 [S], the highest of the tempered
    logits and their log-sum-exp [S].
    """
    state = None if head.w1 is None else torch.zeros(len(anchors), head.rank, dtype=head.w1.dtype, device=anchors.device)
    previous = anchors
    tokens: list[torch.Tensor] = []
    log_sums: list[torch.Tensor] = []
    peaks: list[torch.Tensor] = []
    embeddings: list[torch.Tensor] = []
    for k in range(count):
        embedding = None if head.w1 is None else head.w1[previous]
        if embedding is not None:
            embeddings.append(embedding)
            embedding, state = _mix(head, embedding, state, None if hidden is None else hidden[:, k])
        columns, highest, log_sum = choose(k, embedding)
        previous = columns if head.token_ids is None else head.token_ids[columns]
        tokens.append(previous)
        log_sums.append(log_sum)
        peaks.append(highest)
    lse = torch.stack(log_sums, 1)
    sure = None if hidden is None else _confidence(head, hidden[:, :count], torch.stack(embeddings, 1) if embeddings else None)
    return DraftBlock(torch.stack(tokens, 1), lse, torch.stack(peaks, 1) - lse, sure, None)


def check_block(
    logits: torch.Tensor,
    hidden: torch.Tensor | None,
    head: SequentialHead,
    temperatures: torch.Tensor | None,
    keys: torch.Tensor | None,
) -> None:
    """Raises ValueError where the arguments of `sequential_head` do not fit."""
    if logits.dim() != 3 or 0 in logits.shape[1:]:
        raise ValueError(f"logits must be [sequences, block, vocabulary], got {tuple(logits.shape)}")
    if head.columns not in (None, logits.shape[2]):
        raise ValueError(f"w2 has {head.columns} rows, the logits {logits.shape[2]} columns")
    if hidden is None and (head.mix_weight is not None or head.confidence_weight is not None):
        raise ValueError(
            f"a {head.kind!r} head{' with a confidence head' if head.confidence_weight is not None else ''} needs hidden states"
        )
    if hidden is not None and hidden.shape[:2] != logits.shape[:2]:
        raise ValueError(f"hidden must be [{logits.shape[0]}, {logits.shape[1]}, H], got {tuple(hidden.shape)}")
    if (temperatures is None) != (keys is None):
        raise ValueError("sampling needs temperatures and keys, greedy drafting neither")


def _mix(
    head: SequentialHead, embedding: torch.Tensor, state: torch.Tensor | None, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What W2 is multiplied with [S, r], and the next state [S, r], of one position. embedding: of the token before."""
    if head.kind == "gated":
        assert hidden is not None
        assert head.mix_weight is not None
        gate = torch.nn.functional.linear(torch.cat((hidden.to(embedding.dtype), embedding), 1), head.mix_weight, head.mix_bias)
        embedding = embedding * torch.sigmoid(gate)
    elif head.kind == "rnn":
        assert hidden is not None
        assert state is not None
        assert head.mix_weight is not None
        z = torch.cat((state, embedding, hidden.to(embedding.dtype)), 1)
        gate, candidate, out = torch.nn.functional.linear(z, head.mix_weight, head.mix_bias).chunk(3, dim=1)
        gate = torch.sigmoid(gate)
        state = gate * state + (1.0 - gate) * torch.tanh(candidate)
        embedding = torch.tanh(out)
    return embedding, state


def _bias(head: SequentialHead, embedding: torch.Tensor) -> torch.Tensor:
    """[S, V_d]."""
    if head.packed_w2 is not None:
        return linear(embedding, head.packed_w2)
    assert head.w2 is not None
    return embedding @ head.w2.t()


def _confidence(head: SequentialHead, hidden: torch.Tensor, embeddings: torch.Tensor | None) -> torch.Tensor | None:
    """c_k = sigmoid(w . [h_k; W1[x_{k-1}]] + b) (eq. 7) of all positions [S, K]: none has seen its own x_k."""
    if head.confidence_weight is None:
        return None
    weight = head.confidence_weight.flatten()
    features = hidden.to(weight.dtype)
    if len(weight) > hidden.shape[-1] and embeddings is not None:
        features = torch.cat((features, embeddings), 2)
    score = features @ weight
    return torch.sigmoid(score if head.confidence_bias is None else score + head.confidence_bias)
