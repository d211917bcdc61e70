"""The sequential head over a draft block on the device: a launch or two a position, no number read back.

`_score` walks the vocabulary once: U + features W2^T, noise, and each program's winner. Where features are W1's rows (or there are none),
programs agree on the winner by an atomic maximum, the next launch begins with its row, and `_finish` works out what is left of all
positions at once. Otherwise `_embed` ends the position before (its partial winners become a token) and turns that token into features
[S, rank]. As many programs as the device runs at once stride over the
vocabulary, so that the loads of one tile overlap with the arithmetic of another and few winners are left. The bytes of a block are at least
K (V rank + S V) numbers: W2 does not stay in cache (78 MB of bfloat16 at 152k tokens and rank 256). That is the floor that the benchmark
states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.reference.sequential_head import DraftBlock, SequentialHead, check_block
from kernels.triton import tuning
from kernels.triton.target import needs_wide_dot, processors
from kernels.triton.vocabulary import exponential, sort_key

_TILE_BYTES = 64 * 256 * 2
"""Of W2 in one step: three of them fit a program's share of shared memory when two programs run on a processor."""
_PROGRAMS_A_PROCESSOR = 2
_MOST_SEQUENCES = 64
"""That one program scores at once, so that W2 is read once for all of them."""
_KINDS = {"none": 0, "vanilla": 1, "gated": 2, "rnn": 3}


@triton.jit(do_not_specialize=["step", "length", "parts"])
def _embed(
    anchors, tokens, lse, peak_out, best_value, best_column, part_peak, part_mass, token_ids, w1, mix, mixed_hidden, confidence_weight,
    confidence_hidden, confidence, state, features, step, length, parts, vocab, stride_mix, rank,
    KIND: tl.constexpr, MAPPED: tl.constexpr, CONFIDENT: tl.constexpr, WITH_EMBEDDING: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    token = tl.load(anchors + sequence)
    if step > 0:
        index = tl.arange(0, BLOCK_T)
        at = sequence * parts + index
        values = tl.load(best_value + at, mask=index < parts, other=float("-inf"))
        columns = tl.load(best_column + at, mask=index < parts, other=2147483647)
        peaks = tl.load(part_peak + at, mask=index < parts, other=float("-inf"))
        masses = tl.load(part_mass + at, mask=index < parts, other=0.0)
        # Of a row without a number, the last one, as in `_token`: no column is none.
        column = tl.minimum(tl.min(tl.where(values == tl.max(values, axis=0), columns, 2147483647), axis=0), vocab - 1)
        peak = tl.max(peaks, axis=0)
        mass = tl.sum(masses * tl.exp(peaks - peak), axis=0)
        token = column.to(tl.int64)
        if MAPPED:
            token = tl.load(token_ids + column)
        tl.store(tokens + sequence * length + step - 1, token)
        tl.store(lse + sequence * length + step - 1, peak + tl.log(mass))
        tl.store(peak_out + sequence * length + step - 1, -tl.log(mass))
    if step < length:
        at_step = sequence * length + step
        inner = tl.arange(0, BLOCK_R)
        score = 0.0
        embedding = tl.load(w1 + token * rank + inner, mask=inner < rank, other=0.0).to(tl.float32)
        kind = features.dtype.element_ty
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


@triton.jit(do_not_specialize=["num_sequences", "step", "length"])
def _score(
    logits, features, w2, temperatures, keys, token_ids, weights_out, best_value, best_column, part_peak, part_mass, anchors, winners, w1,
    num_sequences, vocab, step, length, stride_s, stride_k, rank,
    BIASED: tl.constexpr, DIRECT: tl.constexpr, SAMPLED: tl.constexpr, MAPPED: tl.constexpr, KEPT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    part = tl.program_id(1)
    real_rows = rows < num_sequences
    inner = tl.arange(0, BLOCK_R)
    if BIASED:
        f_mask = real_rows[:, None] & (inner < rank)[None, :]
        if DIRECT:
            token = tl.load(anchors + rows, mask=real_rows, other=0)
            if step > 0:
                token = _token(winners + rows * length + step - 1, token_ids, vocab, real_rows, MAPPED)
            f = tl.load(w1 + token[:, None] * rank + inner[None, :], mask=f_mask, other=0.0).to(w2.dtype.element_ty)
        else:
            f = tl.load(features + rows[:, None] * rank + inner[None, :], mask=f_mask, other=0.0)
        if WIDE:
            f = f.to(tl.float32)
    if SAMPLED:
        temperature = tl.load(temperatures + rows, mask=real_rows, other=0.0)
        greedy = temperature == 0.0
        key = tl.load(keys + rows * length + step, mask=real_rows, other=0).to(tl.uint64, bitcast=True)
    # Winners and masses are kept a column: what lies between one load and the next is then no reduction, and nothing waits for it.
    best = tl.full([BLOCK_S, BLOCK_V], float("-inf"), tl.float32)
    best_at = tl.full([BLOCK_S, BLOCK_V], 2147483647, tl.int32)
    peak = tl.full([BLOCK_S, BLOCK_V], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_S, BLOCK_V], tl.float32)
    lanes = tl.arange(0, BLOCK_V)
    w_at = lanes[:, None] * rank + inner[None, :]
    row_at = logits + (rows.to(tl.int64) * stride_s + step * stride_k)[:, None]
    # The logits of a tile are read while the one before it is worked on; W2's tiles are dot operands, for which the compiler does that.
    columns = part * BLOCK_V + lanes
    coming = tl.load(row_at + columns[None, :], mask=real_rows[:, None] & (columns < vocab)[None, :], other=float("-inf"))
    for first in range(part * BLOCK_V, vocab, tl.num_programs(1) * BLOCK_V):
        columns = first + lanes
        real = real_rows[:, None] & (columns < vocab)[None, :]
        weights = coming.to(tl.float32)
        after = columns + tl.num_programs(1) * BLOCK_V
        coming = tl.load(row_at + after[None, :], mask=real_rows[:, None] & (after < vocab)[None, :], other=float("-inf"))
        if BIASED:
            w = tl.load(
                w2 + tl.full([], first, tl.int64) * rank + w_at, mask=(columns < vocab)[:, None] & (inner < rank)[None, :], other=0.0
            )
            if WIDE:
                w = w.to(tl.float32)
            weights += tl.dot(f, tl.trans(w), input_precision="ieee")
        weights = tl.where(real, weights, float("-inf"))
        scores = weights
        if SAMPLED:
            weights = weights / tl.where(greedy, 1.0, temperature)[:, None]
            ids = columns
            if MAPPED:
                ids = tl.load(token_ids + columns, mask=columns < vocab, other=0).to(tl.int32)
            noise = tl.log(exponential(key[:, None], ids[None, :]))
            scores = tl.where(greedy[:, None], weights, weights - noise)
        if KEPT:
            k_at = (rows.to(tl.int64)[:, None] * length + step) * vocab + columns[None, :]
            tl.store(weights_out + k_at, weights, mask=real)
        best_at = tl.where(scores > best, columns[None, :], best_at)  # the columns of a program rise, so equals keep the lowest
        best = tl.maximum(best, scores)
        higher = tl.maximum(peak, weights)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(peak - anchor) + tl.exp(weights - anchor)
        peak = higher
    top = tl.max(best, axis=1)
    which = tl.min(tl.where(best == top[:, None], best_at, 2147483647), axis=1)
    highest = tl.max(peak, axis=1)
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    mass_of_all = tl.sum(mass * tl.exp(peak - anchor[:, None]), axis=1)
    p_at = rows * tl.num_programs(1) + part
    if DIRECT:
        # By value, then by the lowest column; whoever comes first, the largest of these is the same.
        packed = (sort_key(top).to(tl.int64) << 32) | (2147483647 - which).to(tl.int64)
        tl.atomic_max(winners + rows * length + step, packed, mask=real_rows)
        p_at += step * num_sequences * tl.num_programs(1)
    else:
        tl.store(best_value + p_at, top, mask=real_rows)
        tl.store(best_column + p_at, which, mask=real_rows)
    tl.store(part_peak + p_at, highest, mask=real_rows)
    tl.store(part_mass + p_at, mass_of_all, mask=real_rows)


@triton.jit
def _token(at, token_ids, vocab, real, MAPPED: tl.constexpr):
    """int64: the tokens of packed winners; of rows without a number, the last one."""
    column = tl.minimum(2147483647 - (tl.load(at, mask=real, other=0) & 0xFFFFFFFF), vocab - 1)
    token = column
    if MAPPED:
        token = tl.load(token_ids + column, mask=real, other=0)
    return token


@triton.jit(do_not_specialize=["size", "length", "parts"])
def _finish(
    anchors, winners, tokens, lse, peak_out, part_peak, part_mass, token_ids, w1, confidence_weight, confidence_hidden, confidence, size,
    length, parts, vocab, rank, MAPPED: tl.constexpr, CONFIDENT: tl.constexpr, WITH_EMBEDDING: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of one position of one sequence: its token, the sum of its weights, the largest share of it, and how sure the draft is."""
    sequence, step = tl.program_id(0), tl.program_id(1)
    at_step = sequence * length + step
    tl.store(tokens + at_step, _token(winners + at_step, token_ids, vocab, True, MAPPED))
    index = tl.arange(0, BLOCK_T)
    p_at = (step * size + sequence) * parts + index
    peaks = tl.load(part_peak + p_at, mask=index < parts, other=float("-inf"))
    masses = tl.load(part_mass + p_at, mask=index < parts, other=0.0)
    peak = tl.max(peaks, axis=0)
    mass = tl.sum(masses * tl.exp(peaks - peak), axis=0)
    tl.store(lse + at_step, peak + tl.log(mass))
    tl.store(peak_out + at_step, -tl.log(mass))
    if CONFIDENT:
        score = tl.load(confidence_hidden + at_step)
        if WITH_EMBEDDING:
            before = tl.load(anchors + sequence)
            if step > 0:
                before = _token(winners + at_step - 1, token_ids, vocab, True, MAPPED)
            inner = tl.arange(0, BLOCK_R)
            embedding = tl.load(w1 + before * rank + inner, mask=inner < rank, other=0.0).to(tl.float32)
            score += tl.sum(embedding * tl.load(confidence_weight + inner, mask=inner < rank, other=0.0).to(tl.float32), axis=0)
        tl.store(confidence + at_step, tl.sigmoid(score))


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
    lse, largest = torch.empty(2, size, length, dtype=torch.float32, device=device)
    kept = torch.empty(logits.shape if keep_weights else (1,), dtype=torch.float32, device=device)
    confident = head.confidence_weight is not None
    confidence = torch.empty(size, length, dtype=torch.float32, device=device)
    result = DraftBlock(tokens, lse, largest, confidence if confident else None, kept if keep_weights else None)
    if size == 0:
        return result
    rank = head.rank
    block_r = max(triton.next_power_of_2(max(rank, 1)), 16)
    block_s = min(max(triton.next_power_of_2(size), 16), _MOST_SEQUENCES)
    width = 1 if head.w2 is None else head.w2.element_size()
    block_v = min(max(_TILE_BYTES // (block_r * width), 16), 128)
    groups = triton.cdiv(size, block_s)
    parts = min(triton.cdiv(vocab, block_v), max(_PROGRAMS_A_PROCESSOR * processors(device) // groups, 1))
    mix, mixed_hidden = _hidden_part(head, hidden)
    confidence_weight, confidence_hidden = _confidence_part(head, hidden)
    direct = _KINDS[head.kind] < 2
    best = torch.empty(size, parts, dtype=torch.float32, device=device)
    peak, mass = (torch.empty(length if direct else 1, size, parts, dtype=torch.float32, device=device) for _ in range(2))
    winners = torch.full((size, length), torch.iinfo(torch.int64).min, dtype=torch.int64, device=device)
    column = torch.empty(size, parts, dtype=torch.int32, device=device)
    state = torch.zeros(2, size, max(rank, 1), dtype=torch.float32, device=device)
    features = torch.empty(size, max(rank, 1), dtype=logits.dtype if head.w2 is None else head.w2.dtype, device=device)
    depths = (3, 4, 2) if block_s <= 32 else (2, 3)
    configs = [{"num_warps": warps, "num_stages": depth} for warps in ((4, 8) if block_s <= 32 else (8, 4)) for depth in (*depths, 1)]
    ids = anchors if head.token_ids is None else head.token_ids
    w1 = logits if head.w1 is None else head.w1
    confidences = (
        logits if confidence_weight is None else confidence_weight,
        lse if confidence_hidden is None else confidence_hidden,
        confidence,
    )
    about: dict[str, Any] = {
        "MAPPED": head.token_ids is not None,
        "CONFIDENT": confident,
        "WITH_EMBEDDING": confidence_weight is not None,
        "BLOCK_T": triton.next_power_of_2(parts),
        "BLOCK_R": block_r,
    }
    for step in range(length + 1):
        if not direct:
            _embed[(size,)](
                anchors, tokens, lse, largest, best, column, peak, mass, ids, w1, logits if mix is None else mix,
                lse if mixed_hidden is None else mixed_hidden, *confidences, state, features, step, length, parts, vocab,
                0 if mix is None else mix.stride(0), rank, KIND=_KINDS[head.kind], BLOCK_O=min(block_r, 16), num_warps=4, **about,
            )  # fmt: skip
        if step == length:
            break

        def launch(config: tuning.Config, step: int = step) -> None:
            _score[(groups, parts)](
                logits, features, logits if head.w2 is None else head.w2, lse if temperatures is None else temperatures,
                anchors if keys is None else keys, ids, kept, best, column, peak, mass, anchors, winners, w1, size, vocab, step, length,
                logits.stride(0), logits.stride(1), rank, BIASED=head.w2 is not None, DIRECT=direct, SAMPLED=temperatures is not None,
                MAPPED=head.token_ids is not None, KEPT=keep_weights, WIDE=needs_wide_dot(features.dtype), BLOCK_S=block_s,
                BLOCK_V=block_v, BLOCK_R=block_r, num_warps=config["num_warps"], num_stages=config["num_stages"],
            )  # fmt: skip

        tuning.run("sequential_head", f"{block_s}/{block_v}/{block_r}/{str(features.dtype)[6:]}", device, configs, launch)
    if direct:
        _finish[(size, length)](
            anchors, winners, tokens, lse, largest, peak, mass, ids, w1, *confidences, size, length, parts, vocab, rank, num_warps=1,
            **about,
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
