"""Sampling and verification on the device: a program walks one row of logits a few times; nothing is sorted, no row is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.reference.sampling import Allowed, Biases, DraftWeights, Penalties, SampleRows, Tally, Verdict
from kernels.triton.cut import cut, mass_from
from kernels.triton.vocabulary import LEAST_KEY, exponential, processed, row_key, sort_key, uniform

_BLOCK = 4096
_ROOM = 4096
"""Numbers around a threshold that are looked at one by one."""
_WARPS = 16
_MAX_ROWS = 1 << 10
"""Rows of one sequence in a step, for the walk over what stands."""

_TOKEN: tl.constexpr = tl.constexpr(0)
_ACCEPT: tl.constexpr = tl.constexpr(1)
_RESAMPLE: tl.constexpr = tl.constexpr(2)
_GREEDY: tl.constexpr = tl.constexpr(0)
_SEEDED: tl.constexpr = tl.constexpr(1)


@triton.jit
def _verify(
    logits, modes, temperatures, top_ks, top_ps, seeds, positions, all_drafts, attempts, tokens, stands, finite,
    draft_weights, draft_lse, biases, bias_rows, counts, prompt, count_rows, presences, frequencies, repetitions, depths, allowed,
    allowed_rows, scratch, vocab, stride, stride_draft, stride_biases, stride_counts, stride_bits,
    BIASES: tl.constexpr, PENALTIES: tl.constexpr, MASK: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_at = logits + row.to(tl.int64) * stride
    scratch += row.to(tl.int64) * (ROOM + 1)
    drafts = all_drafts
    bias_row, count_row, mask_row = tl.full([], -1, tl.int64), tl.full([], -1, tl.int64), tl.full([], -1, tl.int64)
    depth = tl.zeros([], tl.int32)
    presence, frequency, repetition = 0.0, 0.0, 1.0
    if BIASES:
        bias_row = tl.load(bias_rows + row).to(tl.int64)
    if PENALTIES:
        count_row = tl.load(count_rows + row).to(tl.int64)
        depth = tl.load(depths + row)
        presence = tl.load(presences + row)
        frequency = tl.load(frequencies + row)
        repetition = tl.load(repetitions + row)
    if MASK:
        mask_row = tl.load(allowed_rows + row).to(tl.int64)
    mode = tl.load(modes + row)
    inverse = 1.0 / tl.load(temperatures + row)
    draft = tl.load(drafts + row)

    # Largest logit (of the lowest id), and the mass of the row relative to it.
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = processed(
            row_at, ids, ids < vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts,
            stride_biases, stride_counts, stride_bits, presence, frequency, repetition, BIASES, PENALTIES, MASK,
        )  # fmt: skip
        wrong += (x != x).to(tl.int32)
        higher = tl.maximum(best, x)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp((best - anchor) * inverse) + tl.exp((x - anchor) * inverse)
        best_id = tl.where(x > best, ids, best_id)
        best = higher
    peak = tl.max(best, axis=0)
    token = tl.min(tl.where(best == peak, best_id, 2147483647), axis=0).to(tl.int64)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(total * tl.where(best == float("-inf"), 0.0, tl.exp((best - anchor) * inverse)), axis=0)
    good = (tl.sum(wrong, axis=0) == 0) & (peak > float("-inf")) & (peak < float("inf"))
    tl.store(finite + row, good.to(tl.int8))
    stood = token == draft

    if (mode != _GREEDY) & good:
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        low = tl.full([], LEAST_KEY, tl.int64)  # the smallest key that stays in
        # tl.max gives a scalar; its key by the same rule as the keys it is compared with.
        high = tl.max(sort_key(tl.zeros([BLOCK], tl.float32) + peak), axis=0).to(tl.int64)
        if (top_k > 0) & (top_k < vocab):
            low = cut(
                row_at, vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts, stride_biases,
                stride_counts, stride_bits, presence, frequency, repetition, scratch, peak, inverse, top_k, low, high,
                False, BIASES, PENALTIES, MASK, BLOCK, ROOM,
            )  # fmt: skip
            mass = mass_from(
                row_at, vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts, stride_biases,
                stride_counts, stride_bits, presence, frequency, repetition, peak, inverse, low, BIASES, PENALTIES, MASK, BLOCK
            )  # fmt: skip
        if top_p < 1.0:
            low = cut(
                row_at, vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts, stride_biases,
                stride_counts, stride_bits, presence, frequency, repetition, scratch, peak, inverse, top_p * mass, low - 1, high,
                True, BIASES, PENALTIES, MASK, BLOCK, ROOM,
            )  # fmt: skip
            mass = mass_from(
                row_at, vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts, stride_biases,
                stride_counts, stride_bits, presence, frequency, repetition, peak, inverse, low, BIASES, PENALTIES, MASK, BLOCK
            )  # fmt: skip

        seeded = mode == _SEEDED
        seed = tl.load(seeds + row)
        position = tl.load(positions + row)
        attempt = tl.load(attempts)
        key = row_key(seed, position, attempt, _RESAMPLE)
        if seeded:
            key = row_key(seed, position, attempt * 0, _TOKEN)
        drafted = (draft >= 0) & (mode != _SEEDED)
        lse = 0.0
        if WEIGHED:
            lse = tl.load(draft_lse + row).to(tl.float32)
        least = tl.full([BLOCK], float("inf"), tl.float32)
        least_id = tl.zeros([BLOCK], tl.int32)
        p_of_draft = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = processed(
                row_at, ids, ids < vocab, row, bias_row, count_row, mask_row, depth, biases, counts, prompt, allowed, drafts,
                stride_biases, stride_counts, stride_bits, presence, frequency, repetition, BIASES, PENALTIES, MASK,
            )  # fmt: skip
            p = tl.where(sort_key(x) >= low, tl.exp((x - peak) * inverse), 0.0) / mass
            p_of_draft += tl.where(ids == draft, p, 0.0)
            weight = p
            if WEIGHED:
                at = draft_weights + row.to(tl.int64) * stride_draft + ids
                q = tl.exp(tl.load(at, mask=ids < vocab, other=float("-inf")).to(tl.float32) - lse)
                weight = tl.where(drafted, tl.maximum(p - q, 0.0), p)
            else:
                weight = tl.where(drafted & (ids == draft), 0.0, p)
            arrival = tl.where(weight > 0.0, exponential(key, ids) / tl.where(weight > 0.0, weight, 1.0), float("inf"))
            sooner = arrival < least
            least_id = tl.where(sooner, ids, least_id)
            least = tl.where(sooner, arrival, least)
        first = tl.min(least, axis=0)
        token = tl.min(tl.where(least == first, least_id, 2147483647), axis=0).to(tl.int64)
        ratio = tl.sum(p_of_draft, axis=0)
        if WEIGHED:
            known = tl.load(draft_weights + row.to(tl.int64) * stride_draft + tl.maximum(draft, 0)).to(tl.float32)
            ratio = ratio / tl.exp(known - lse)
        stood = drafted & (uniform(row_key(seed, position, attempt, _ACCEPT)) < ratio.to(tl.float64))
        if seeded:
            stood = token == draft
    tl.store(tokens + row, token)
    tl.store(stands + row, stood.to(tl.int8))


@triton.jit(do_not_specialize=["top"])
def _log_probs(logits, rows, wanted, chosen, top_ids, top_values, vocab, stride, top, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    row_at = logits + tl.load(rows + row) * stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row_at + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(best, x)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(best - anchor) + tl.exp(x - anchor)
        best = higher
    peak = tl.max(best, axis=0)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    lse = anchor + tl.log(tl.sum(total * tl.where(best == float("-inf"), 0.0, tl.exp(best - anchor)), axis=0))
    tl.store(chosen + row, tl.load(row_at + tl.load(wanted + row)).to(tl.float32) - lse)
    # The next best is the best of those after the last one in (value falling, id rising).
    last_value, last_id = float("inf"), -1
    for place in range(top):
        value = tl.full([BLOCK], float("-inf"), tl.float32)
        which = tl.full([BLOCK], 2147483647, tl.int32)
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(row_at + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            left = (ids < vocab) & ((x < last_value) | ((x == last_value) & (ids > last_id)))
            better = left & ((x > value) | (which == 2147483647))
            which = tl.where(better, ids, which)
            value = tl.where(better, x, value)
        last_value = tl.max(value, axis=0)
        last_id = tl.min(tl.where(value == last_value, which, 2147483647), axis=0)
        tl.store(top_ids + row * top + place, last_id.to(tl.int64))
        tl.store(top_values + row * top + place, last_value - lse)


@triton.jit(do_not_specialize=["size", "stride_counts"])
def _accept(stands, tokens, finite, row_start, made, counts, lines, drafts, size, stride_counts, TALLY: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    first = tl.load(row_start + sequence)
    rows = tl.load(row_start + sequence + 1) - first
    index = tl.arange(0, BLOCK)
    stood = tl.load(stands + first + index, mask=index < rows - 1, other=0)
    count = tl.min(tl.where(stood != 0, BLOCK, index), axis=0)
    good = tl.load(finite + first + index, mask=index < rows, other=1)
    following = tl.load(tokens + first + count, mask=rows > 0, other=-1)
    tl.store(made + sequence, tl.where(rows > 0, count, 0).to(tl.int64))
    tl.store(made + size + sequence, following)
    tl.store(made + 2 * size + sequence, tl.min((good != 0).to(tl.int64), axis=0))
    if TALLY:
        line = tl.load(lines + sequence).to(tl.int64)
        if (line >= 0) & (rows > 0):
            token = tl.load(drafts + first + index, mask=index < count, other=0)
            token = tl.where(index < count, token, following)
            tl.atomic_add(counts + line * stride_counts + token, 1, mask=index <= count)


def verify(
    logits: torch.Tensor,
    rows: SampleRows,
    attempt: torch.Tensor,
    *,
    draft: DraftWeights | None = None,
    biases: Biases | None = None,
    penalties: Penalties | None = None,
    allowed: Allowed | None = None,
) -> Verdict:
    """As `kernels.reference.sampling.verify`; logits float32, float16 or bfloat16 [R, V]. Raises ValueError naming what does not fit."""
    num_rows, vocab = logits.shape
    _check_rows(logits, rows, draft, biases, penalties, allowed)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    stands, finite = (torch.empty(num_rows, dtype=torch.bool, device=logits.device) for _ in range(2))
    if num_rows == 0:
        return Verdict(tokens, stands, finite)
    scratch = torch.empty(num_rows, _ROOM + 1, dtype=torch.int32, device=logits.device)
    bits = penalties.prompt if penalties is not None else allowed.bits if allowed is not None else rows.modes
    _verify[(num_rows,)](
        logits, rows.modes, rows.temperatures, rows.top_ks, rows.top_ps, rows.seeds, rows.positions, rows.drafts, attempt,
        tokens, stands.view(torch.int8), finite.view(torch.int8),
        logits if draft is None else draft.log_weights, rows.temperatures if draft is None else draft.lse,
        rows.temperatures if biases is None else biases.values, rows.modes if biases is None else biases.rows,
        *((rows.modes, rows.modes, rows.modes, rows.top_ps, rows.top_ps, rows.top_ps, rows.modes) if penalties is None else
          (penalties.counts, penalties.prompt, penalties.rows, penalties.presence, penalties.frequency, penalties.repetition,
           penalties.depth)),
        rows.modes if allowed is None else allowed.bits, rows.modes if allowed is None else allowed.rows,
        scratch, vocab, logits.stride(0), 0 if draft is None else draft.log_weights.stride(0),
        0 if biases is None else biases.values.stride(0), 0 if penalties is None else penalties.counts.stride(0), bits.stride(0),
        BIASES=biases is not None, PENALTIES=penalties is not None, MASK=allowed is not None, WEIGHED=draft is not None,
        BLOCK=_BLOCK, ROOM=_ROOM, num_warps=_WARPS,
    )  # fmt: skip
    return Verdict(tokens, stands, finite)


def token_log_probs(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.reference.sampling.token_log_probs`, in float32. Raises ValueError for `top` outside [0, V], or tokens amiss."""
    vocab, count = logits.shape[1], len(rows)
    if not 0 <= top <= vocab:
        raise ValueError(f"top must be between 0 and {vocab}, got {top}")
    if tokens.shape != (count,) or logits.stride(1) != 1:
        raise ValueError(f"{count} rows need as many tokens and lie side by side, got {tuple(tokens.shape)}, strides {logits.stride()}")
    chosen = torch.empty(count, dtype=torch.float32, device=logits.device)
    ids = torch.empty(count, top, dtype=torch.int64, device=logits.device)
    values = torch.empty(count, top, dtype=torch.float32, device=logits.device)
    if count:
        _log_probs[(count,)](
            logits, rows, tokens, chosen, ids, values, vocab, logits.stride(0), top, BLOCK=_BLOCK, num_warps=_WARPS
        )  # fmt: skip
    return chosen, ids, values


def accept_drafts(verdict: Verdict, row_start: torch.Tensor, tally: Tally | None = None, most_rows: int = _MAX_ROWS) -> torch.Tensor:
    """As `kernels.reference.sampling.accept_drafts`; no sequence has more than `most_rows` rows. Raises ValueError for a tally amiss."""
    size = len(row_start) - 1
    if tally is not None and (tally.lines.shape != (size,) or tally.drafts.shape != verdict.tokens.shape or tally.counts.stride(1) != 1):
        raise ValueError(
            f"a tally of {size} sequences and {len(verdict.tokens)} rows cannot have lines {tuple(tally.lines.shape)}, "
            f"drafts {tuple(tally.drafts.shape)} and counts with strides {tally.counts.stride()}"
        )
    made = torch.empty(3, size, dtype=torch.int64, device=row_start.device)
    if size:
        _accept[(size,)](
            verdict.stands.view(torch.int8), verdict.tokens, verdict.finite.view(torch.int8), row_start, made,
            row_start if tally is None else tally.counts, row_start if tally is None else tally.lines,
            verdict.tokens if tally is None else tally.drafts, size, 0 if tally is None else tally.counts.stride(0),
            TALLY=tally is not None, BLOCK=triton.next_power_of_2(max(most_rows, 2)), num_warps=1,
        )  # fmt: skip
    return made


def _check_rows(
    logits: torch.Tensor,
    rows: SampleRows,
    draft: DraftWeights | None,
    biases: Biases | None,
    penalties: Penalties | None,
    allowed: Allowed | None,
) -> None:
    num_rows, vocab = logits.shape
    if logits.stride(1) != 1:
        raise ValueError(f"a row of logits must lie side by side, got strides {logits.stride()}")
    wanted = {
        "modes": torch.int32,
        "temperatures": torch.float32,
        "top_ks": torch.int32,
        "top_ps": torch.float32,
        "seeds": torch.int64,
        "positions": torch.int64,
        "drafts": torch.int64,
    }
    for name, dtype in wanted.items():
        value = getattr(rows, name)
        if value.shape != (num_rows,) or value.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} [{num_rows}], got {value.dtype} {tuple(value.shape)}")
    if draft is not None and (draft.log_weights.shape != logits.shape or draft.lse.shape != (num_rows,)):
        raise ValueError(f"draft weights must be {tuple(logits.shape)}, got {tuple(draft.log_weights.shape)} and {tuple(draft.lse.shape)}")
    if biases is not None and (biases.values.shape[1] != vocab or biases.values.dtype != torch.float32 or biases.rows.shape != (num_rows,)):
        raise ValueError(f"biases of {num_rows} rows of {vocab} must be float32 of that width, got {tuple(biases.values.shape)}")
    words = -(-vocab // 32)
    if penalties is not None and (penalties.counts.shape[1] != vocab or penalties.prompt.shape[1] != words):
        raise ValueError(f"penalties of {vocab} tokens need counts of that width and {words} words of prompt bits")
    if allowed is not None and allowed.bits.shape[1] != words:
        raise ValueError(f"a mask of {vocab} tokens has {words} words, got {allowed.bits.shape[1]}")
