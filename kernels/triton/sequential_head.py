"""The sequential head over a draft block on the device: two small launches a position, no number read back.

`_embed` ends the position before (its partial winners become a token) and turns that token into features [S, rank]; `_score` walks the
vocabulary once: U + features W2^T, noise, and the winner of each stretch. The bytes of a block are at least K (V rank + S V) numbers
(W2 does not stay in cache: 78 MB of bfloat16 at 152k tokens and rank 256), which is the floor that the benchmark states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.reference.sequential_head import DraftBlock, SequentialHead, check_block
from kernels.triton.target import needs_wide_dot
from kernels.triton.vocabulary import exponential

_BLOCK_V = 128
_BLOCK_S = 16
_KINDS = {"none": 0, "vanilla": 1, "gated": 2, "rnn": 3}


@triton.jit
def _embed(
    anchors, tokens, lse, best_value, best_column, part_peak, part_mass, token_ids, w1, mix, mixed_hidden, confidence_weight,
    confidence_hidden, confidence, state, features, step, length, tiles, stride_mix, rank,
    KIND: tl.constexpr, MAPPED: tl.constexpr, CONFIDENT: tl.constexpr, WITH_EMBEDDING: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    token = tl.load(anchors + sequence)
    if step > 0:
        value = float("-inf")
        column = tl.full([], 2147483647, tl.int32)
        peak = float("-inf")
        for start in range(0, tiles, BLOCK_T):
            index = start + tl.arange(0, BLOCK_T)
            at = sequence * tiles + index
            values = tl.load(best_value + at, mask=index < tiles, other=float("-inf"))
            columns = tl.load(best_column + at, mask=index < tiles, other=2147483647)
            top = tl.max(values, axis=0)
            which = tl.min(tl.where(values == top, columns, 2147483647), axis=0)
            column = tl.where(top > value, which, column)
            value = tl.maximum(value, top)
            peak = tl.maximum(peak, tl.max(tl.load(part_peak + at, mask=index < tiles, other=float("-inf")), axis=0))
        mass = 0.0
        for start in range(0, tiles, BLOCK_T):
            index = start + tl.arange(0, BLOCK_T)
            at = sequence * tiles + index
            peaks = tl.load(part_peak + at, mask=index < tiles, other=float("-inf"))
            masses = tl.load(part_mass + at, mask=index < tiles, other=0.0)
            mass += tl.sum(masses * tl.exp(peaks - peak), axis=0)
        token = column.to(tl.int64)
        if MAPPED:
            token = tl.load(token_ids + column)
        tl.store(tokens + sequence * length + step - 1, token)
        tl.store(lse + sequence * length + step - 1, peak + tl.log(mass))
    if step < length:
        at_step = sequence * length + step
        inner = tl.arange(0, BLOCK_R)
        score = 0.0
        if KIND > 0:
            embedding = tl.load(w1 + token * rank + inner, mask=inner < rank, other=0.0).to(tl.float32)
            kind = features.dtype.element_ty
            if KIND == 1:
                tl.store(features + sequence * rank + inner, embedding.to(kind), mask=inner < rank)
            if KIND == 2:
                for first in range(0, rank, BLOCK_O):
                    outer = first + tl.arange(0, BLOCK_O)
                    gate = _mixed(mixed_hidden + at_step * rank, mix, outer, inner, embedding, rank, stride_mix)
                    own = tl.load(w1 + token * rank + outer, mask=outer < rank, other=0.0).to(tl.float32)
                    tl.store(features + sequence * rank + outer, (own * tl.sigmoid(gate)).to(kind), mask=outer < rank)
            if KIND == 3:
                # Two states, read and written in turn: programs of one launch never touch the other's row, but outputs need all inputs.
                size = tl.num_programs(0) * rank
                old = state + (step % 2) * size + sequence * rank
                new = state + ((step + 1) % 2) * size + sequence * rank
                before = tl.load(old + inner, mask=inner < rank, other=0.0)
                hidden = mixed_hidden + at_step * 3 * rank
                for first in range(0, rank, BLOCK_O):
                    outer = first + tl.arange(0, BLOCK_O)
                    gate = _recurrent(hidden, mix, outer, inner, before, embedding, rank, stride_mix)
                    candidate = _recurrent(hidden + rank, mix + rank * stride_mix, outer, inner, before, embedding, rank, stride_mix)
                    out = _recurrent(hidden + 2 * rank, mix + 2 * rank * stride_mix, outer, inner, before, embedding, rank, stride_mix)
                    gate = tl.sigmoid(gate)
                    was = tl.load(old + outer, mask=outer < rank, other=0.0)
                    tl.store(new + outer, gate * was + (1.0 - gate) * _tanh(candidate), mask=outer < rank)
                    tl.store(features + sequence * rank + outer, _tanh(out).to(kind), mask=outer < rank)
            if CONFIDENT and WITH_EMBEDDING:
                score += tl.sum(embedding * tl.load(confidence_weight + inner, mask=inner < rank, other=0.0).to(tl.float32), axis=0)
        if CONFIDENT:
            score += tl.load(confidence_hidden + at_step)
            tl.store(confidence + at_step, tl.sigmoid(score))


@triton.jit
def _mixed(hidden, mix, outer, inner, embedding, rank, stride_mix):
    """float32 [BLOCK_O]: the rows `outer` of the projection, its hidden part already there."""
    weight = tl.load(mix + outer[:, None] * stride_mix + inner[None, :], mask=(outer < rank)[:, None] & (inner < rank)[None, :], other=0.0)
    part = tl.sum(weight.to(tl.float32) * embedding[None, :], axis=1)
    return part + tl.load(hidden + outer, mask=outer < rank, other=0.0)


@triton.jit
def _recurrent(hidden, mix, outer, inner, state, embedding, rank, stride_mix):
    of_embedding = _mixed(hidden, mix + rank, outer, inner, embedding, rank, stride_mix)
    weight = tl.load(mix + outer[:, None] * stride_mix + inner[None, :], mask=(outer < rank)[:, None] & (inner < rank)[None, :], other=0.0)
    return of_embedding + tl.sum(weight.to(tl.float32) * state[None, :], axis=1)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _score(
    logits, features, w2, temperatures, keys, token_ids, weights_out, best_value, best_column, part_peak, part_mass,
    num_sequences, vocab, step, length, stride_s, stride_k, tiles, rank,
    BIASED: tl.constexpr, SAMPLED: tl.constexpr, MAPPED: tl.constexpr, KEPT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    tile = tl.program_id(1)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    real = (rows < num_sequences)[:, None] & (columns < vocab)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_s + step * stride_k + columns[None, :]
    weights = tl.load(logits + at, mask=real, other=float("-inf")).to(tl.float32)
    if BIASED:
        bias = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
        for first in range(0, rank, BLOCK_R):
            inner = first + tl.arange(0, BLOCK_R)
            f_at = rows[:, None] * rank + inner[None, :]
            f = tl.load(features + f_at, mask=(rows < num_sequences)[:, None] & (inner < rank)[None, :], other=0.0)
            w_at = columns.to(tl.int64)[None, :] * rank + inner[:, None]
            w = tl.load(w2 + w_at, mask=(columns < vocab)[None, :] & (inner < rank)[:, None], other=0.0)
            if WIDE:
                f = f.to(tl.float32)
                w = w.to(tl.float32)
            bias = tl.dot(f, w, bias, input_precision="ieee")
        weights += bias
    weights = tl.where(real, weights, float("-inf"))
    scores = weights
    if SAMPLED:
        temperature = tl.load(temperatures + rows, mask=rows < num_sequences, other=0.0)
        greedy = temperature == 0.0
        weights = weights / tl.where(greedy, 1.0, temperature)[:, None]
        key = tl.load(keys + rows * length + step, mask=rows < num_sequences, other=0).to(tl.uint64, bitcast=True)
        ids = columns
        if MAPPED:
            ids = tl.load(token_ids + columns, mask=columns < vocab, other=0).to(tl.int32)
        noise = tl.log(exponential(key[:, None], ids[None, :]))
        scores = tl.where(greedy[:, None], weights, weights - noise)
    if KEPT:
        k_at = (rows.to(tl.int64)[:, None] * length + step) * vocab + columns[None, :]
        tl.store(weights_out + k_at, weights, mask=real)
    top = tl.max(scores, axis=1)
    which = tl.min(tl.where(scores == top[:, None], columns[None, :], 2147483647), axis=1)
    peak = tl.max(weights, axis=1)
    mass = tl.sum(tl.exp(weights - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), axis=1)
    p_at = rows * tiles + tile
    tl.store(best_value + p_at, top, mask=rows < num_sequences)
    tl.store(best_column + p_at, which, mask=rows < num_sequences)
    tl.store(part_peak + p_at, peak, mask=rows < num_sequences)
    tl.store(part_mass + p_at, mass, mask=rows < num_sequences)


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
    """As `kernels.reference.sequential_head`, with float32 sums; weights are kept in float32."""
    check_block(logits, hidden, head, temperatures, keys)
    size, length, vocab = logits.shape
    if logits.stride(2) != 1:
        raise ValueError(f"a row of logits must lie side by side, got strides {logits.stride()}")
    device = logits.device
    tokens = torch.empty(size, length, dtype=torch.int64, device=device)
    lse = torch.empty(size, length, dtype=torch.float32, device=device)
    kept = torch.empty(logits.shape if keep_weights else (1,), dtype=torch.float32, device=device)
    confident = head.confidence_weight is not None
    confidence = torch.empty(size, length, dtype=torch.float32, device=device)
    result = DraftBlock(tokens, lse, confidence if confident else None, kept if keep_weights else None)
    if size == 0:
        return result
    tiles, rank = triton.cdiv(vocab, _BLOCK_V), head.rank
    mix, mixed_hidden = _hidden_part(head, hidden)
    confidence_weight, confidence_hidden = _confidence_part(head, hidden)
    best, peak, mass = (torch.empty(size, tiles, dtype=torch.float32, device=device) for _ in range(3))
    column = torch.empty(size, tiles, dtype=torch.int32, device=device)
    state = torch.zeros(2, size, max(rank, 1), dtype=torch.float32, device=device)
    features = torch.empty(size, max(rank, 1), dtype=logits.dtype if head.w2 is None else head.w2.dtype, device=device)
    block_r = max(triton.next_power_of_2(max(rank, 1)), 16)
    ids = anchors if head.token_ids is None else head.token_ids
    for step in range(length + 1):
        _embed[(size,)](
            anchors, tokens, lse, best, column, peak, mass, ids, logits if head.w1 is None else head.w1,
            logits if mix is None else mix, lse if mixed_hidden is None else mixed_hidden,
            logits if confidence_weight is None else confidence_weight, lse if confidence_hidden is None else confidence_hidden,
            confidence, state, features, step, length, tiles, 0 if mix is None else mix.stride(0), rank,
            KIND=_KINDS[head.kind], MAPPED=head.token_ids is not None, CONFIDENT=confident, WITH_EMBEDDING=confidence_weight is not None,
            BLOCK_T=1024, BLOCK_R=block_r, BLOCK_O=min(block_r, 16), num_warps=4,
        )  # fmt: skip
        if step == length:
            break
        _score[(triton.cdiv(size, _BLOCK_S), tiles)](
            logits, features, logits if head.w2 is None else head.w2, lse if temperatures is None else temperatures,
            anchors if keys is None else keys, ids, kept, best, column, peak, mass, size, vocab, step, length, logits.stride(0),
            logits.stride(1), tiles, rank, BIASED=head.w2 is not None, SAMPLED=temperatures is not None,
            MAPPED=head.token_ids is not None, KEPT=keep_weights, WIDE=needs_wide_dot(features.dtype), BLOCK_S=_BLOCK_S,
            BLOCK_V=_BLOCK_V, BLOCK_R=min(block_r, 64), num_warps=4, num_stages=4,
        )  # fmt: skip
    return result


def _hidden_part(head: SequentialHead, hidden: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The columns of the projection that see tokens, and what its other columns give for all positions at once, float32 [S, K, rows].

    Columns are [h; W1[x]] of a gated head and [s; W1[x]; h] of a recurrent one.
    """
    if head.mix_weight is None or hidden is None:
        return None, None
    weight = head.mix_weight.contiguous()
    width = hidden.shape[-1]
    of_hidden, of_tokens = (weight[:, 2 * head.rank :], weight) if head.kind == "rnn" else (weight[:, :width], weight[:, width:])
    return of_tokens, torch.nn.functional.linear(hidden.to(weight.dtype), of_hidden, head.mix_bias).float().contiguous()


def _confidence_part(head: SequentialHead, hidden: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The weights that see W1[x] (None where there are none), and the rest of the score for all positions, float32 [S, K]."""
    if head.confidence_weight is None or hidden is None:
        return None, None
    weight = head.confidence_weight.flatten().contiguous()
    width = hidden.shape[-1]
    score = (hidden.to(weight.dtype) @ weight[:width]).float()
    if head.confidence_bias is not None:
        score = score + head.confidence_bias.float()
    return weight[width:] if len(weight) > width else None, score.contiguous()
