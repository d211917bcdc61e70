"""Sampling and log-probabilities over the vocabulary, and verification of drafts, from their definitions; float64-capable.

A row's distribution: biases, penalties, allowed tokens, temperature, top-k, top-p, in this order. Top-k keeps what is not below the k-th
largest; top-p keeps a token while those strictly above it hold less than top_p of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch

from kernels.reference.noise import exponential, row_keys, uniform

NO_DRAFT = -1
ACCEPT, RESAMPLE, TOKEN = 1, 2, 0
"""Streams of noise, numbered as in `engine.noise.Stream`."""


class Mode(IntEnum):
    """How a row is decided, as in `engine.speculation.verify`."""

    GREEDY = 0
    SEEDED = 1
    STOCHASTIC = 2


@dataclass(frozen=True, slots=True)
class SampleRows:
    """What each of R logit rows is held against, on the device; shape [R].

    modes: int32 (`Mode`). temperatures, top_ps: float32 (1 = off). top_ks: int32 (0 = off). seeds, positions: int64, the row's noise
    (`kernels.reference.noise.row_keys`). drafts: int64, NO_DRAFT where there is none.
    """

    modes: torch.Tensor
    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    drafts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Biases:
    """values: float32 [N, V], what is added to logits (-inf forbids). rows: int32 [R], the line that a logit row belongs to, -1: none."""

    values: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """counts: int32 [N, V], how often each token was generated; prompt: int32 [N, ceil(V / 32)], bit t set for tokens of the prompt.

    rows: int32 [R], the line of both that a logit row belongs to, -1: none. presence, frequency, repetition: float32 [R] (0, 0 and 1 are
    off). depth: int32 [R], how many drafts of the same block stand before the row, in the rows before it: they count as generated.
    """

    counts: torch.Tensor
    prompt: torch.Tensor
    rows: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor
    depth: torch.Tensor


@dataclass(frozen=True, slots=True)
class Allowed:
    """bits: int32 [N, ceil(V / 32)], bit t of a row set for tokens that may come (xgrammar's layout). rows: int32 [R], -1: any token."""

    bits: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """What drafts were drawn from: exp(log_weights [R, V] - lse [R])."""

    log_weights: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tally:
    """Where the tokens that a step confirms are counted, for the penalties of the next: `counts` int32 [N, V], changed in place.

    lines: int32 [S], each sequence's line, -1: it is not counted. drafts: int64 [R], those that were judged.
    """

    counts: torch.Tensor
    lines: torch.Tensor
    drafts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """Per row: `tokens` int64 to produce if the row's draft falls, `stands` bool, `finite` bool (False: NaN, inf, or nothing allowed)."""

    tokens: torch.Tensor
    stands: torch.Tensor
    finite: torch.Tensor


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
    """Judges R rows of logits [R, V]; see `engine.speculation.verify` for the rules. attempt: int64 [1], never used before in a run.

    draft: None where all drafters are certain. Without drafts this is sampling.
    """
    scores = process(logits, rows.drafts, biases, penalties, allowed)
    peaks, tokens = scores.max(1)
    finite = peaks.isfinite() & ~logits.isnan().any(1)
    p = distribution(scores, rows.temperatures, rows.top_ks, rows.top_ps)
    seeded, sampled = rows.modes == Mode.SEEDED, rows.modes != Mode.GREEDY
    drafted = (rows.drafts >= 0) & ~seeded
    x = rows.drafts.clamp(min=0)
    if draft is None:
        q_of_x: torch.Tensor | float = 1.0
        residual = p.scatter(1, x[:, None], 0.0)
    else:
        q = torch.exp(draft.log_weights.to(p.dtype) - draft.lse.to(p.dtype)[:, None])
        q_of_x = q.gather(1, x[:, None])[:, 0]
        residual = (p - q).clamp(min=0.0)
    accept = uniform(row_keys(rows.seeds, rows.positions, ACCEPT, attempt)) < p.gather(1, x[:, None])[:, 0] / q_of_x
    stream = torch.where(seeded, TOKEN, RESAMPLE)
    keys = row_keys(rows.seeds, rows.positions, stream, torch.where(seeded, 0, attempt))
    noise = exponential(keys, torch.arange(logits.shape[1], device=logits.device))
    winners = (noise / torch.where(drafted[:, None], residual, p)).argmin(1)
    tokens = torch.where(sampled, winners, tokens)
    stands = torch.where(sampled & ~seeded, drafted & accept, tokens == rows.drafts)
    return Verdict(tokens, stands, finite)


def process(
    logits: torch.Tensor, drafts: torch.Tensor, biases: Biases | None, penalties: Penalties | None, allowed: Allowed | None
) -> torch.Tensor:
    """Logits [R, V] after biases, penalties and the mask, float32 or wider."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = torch.arange(logits.shape[1], device=logits.device)
    if biases is not None:
        known = biases.rows >= 0
        scores = scores + torch.where(known[:, None], biases.values[biases.rows.clamp(min=0).long()], 0.0)
    if penalties is not None:
        lines = penalties.rows.clamp(min=0).long()
        made = penalties.counts[lines]
        for row, depth in enumerate(penalties.depth.tolist()):
            for token in drafts[row - depth : row].tolist():
                made[row, token] += 1
        seen = (made > 0) | _bits(penalties.prompt[lines], ids)
        repetition = penalties.repetition[:, None]
        changed = torch.where(seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
        changed = changed - made * penalties.frequency[:, None] - (made > 0) * penalties.presence[:, None]
        scores = torch.where((penalties.rows >= 0)[:, None], changed, scores)
    if allowed is not None:
        free = (allowed.rows < 0)[:, None]
        scores = scores.masked_fill(~(free | _bits(allowed.bits[allowed.rows.clamp(min=0).long()], ids)), -torch.inf)
    return scores


def distribution(scores: torch.Tensor, temperatures: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """[R, V] probabilities, by sorting whole rows."""
    vocab = scores.shape[1]
    scaled = scores / temperatures[:, None]
    ordered = scaled.sort(dim=1, descending=True).values
    last = ordered.gather(1, (torch.where((top_ks > 0) & (top_ks < vocab), top_ks, vocab).long() - 1)[:, None])
    mass = torch.softmax(scaled.masked_fill(scaled < last, -torch.inf), dim=1)
    in_order, at = mass.sort(dim=1, descending=True)
    above = in_order.cumsum(1) - in_order
    # What is strictly above: equal numbers share the sum before the first of them.
    fresh = torch.ones_like(in_order, dtype=torch.bool)
    fresh[:, 1:] = in_order[:, 1:] < in_order[:, :-1]
    above = torch.where(fresh, above, 0.0).cummax(1).values
    kept = torch.zeros_like(fresh).scatter(1, at, (above < top_ps[:, None]) | (top_ps >= 1.0)[:, None])
    mass = mass * kept
    return mass / mass.sum(1, keepdim=True)


def token_log_probs(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the model's own distribution in `rows` int64 [K] of `logits` [R, V]: of `tokens` int64 [K], float32 [K], and of
    the `top` likeliest ones, ids int64 and values float32 [K, top], best first, equal ones by id.
    """
    wanted = logits[rows]
    values = torch.log_softmax(wanted.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    best, ids = values.sort(dim=1, descending=True, stable=True)
    return values.gather(1, tokens[:, None])[:, 0], ids[:, :top].contiguous(), best[:, :top].contiguous()


def accept_drafts(verdict: Verdict, row_start: torch.Tensor, tally: Tally | None = None) -> torch.Tensor:
    """int64 [3, S]: how many leading drafts of each sequence stand, the token after them, whether all its rows were finite (1 or 0).

    row_start: int32 [S + 1]; the rows of a sequence decide its drafts and one token more. Sequences without rows: 0, -1, 1. tally: counts
    the drafts that stand and the token after them.
    """
    made = []
    for sequence, (first, end) in enumerate(pairwise(row_start.tolist())):
        stands = verdict.stands[first : max(end - 1, first)].tolist()
        count = next((index for index, stood in enumerate(stands) if not stood), len(stands))
        following = int(verdict.tokens[first + count]) if end > first else -1
        made.append((count, following, int(verdict.finite[first:end].all())))
        if tally is not None and end > first and (line := int(tally.lines[sequence])) >= 0:
            for token in (*tally.drafts[first : first + count].tolist(), following):
                tally.counts[line, token] += 1
    return torch.tensor(made, dtype=torch.int64, device=row_start.device).view(-1, 3).T.contiguous()


def _bits(words: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """bool [R, V] of packed bits int32 [R, ceil(V / 32)]."""
    return (words[:, ids // 32] >> (ids % 32).to(torch.int32)) & 1 == 1
