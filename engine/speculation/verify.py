"""Exact verification: which drafted tokens stand, and what comes after the last of them.

Every row of logits answers two questions: would the drafted token of this row have been produced, and which token is produced
here if it was not (or if there was none)?

- greedy: the argmax; a draft stands iff it is the argmax.
- seeded: the Gumbel-argmax under noise keyed by (seed, position); a draft stands iff it is that token. So the text is a
  function of prompt, parameters and seed, whatever was drafted.
- stochastic: a draft x ~ q stands with probability min(1, p(x) / q(x)); else the token is drawn from the residual
  (p - q)+ (Leviathan et al. 2023, theorem 1 and appendix A.1; Chen et al. 2023). A deterministic drafter has q(x) = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch import Peaks
from engine.noise import Stream, keys, uniform
from engine.sampling import Distribution, draw, narrow_width, temper, truncate

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_DRAFT = -1
_NUMBERS_AT_ONCE = 1 << 20
"""Sampled rows handled together, in numbers: 21 rows over 49,152 tokens are 4 MB, which a CPU's caches still hold."""


class Mode(IntEnum):
    GREEDY = 0
    SEEDED = 1
    STOCHASTIC = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """What each of R logit rows is to be held against; numpy, shape [R].

    modes int8 (`Mode`); temperatures float32; top_ks int64; top_ps float32; seeds uint64; positions int64, the index of the
    generated token that the row decides; drafts int64, NO_DRAFT where there is none.
    """

    modes: NDArray[np.int8]
    temperatures: NDArray[np.float32]
    top_ks: NDArray[np.int64]
    top_ps: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    positions: NDArray[np.int64]
    drafts: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> Rows:
        return Rows(
            self.modes[index],
            self.temperatures[index],
            self.top_ks[index],
            self.top_ps[index],
            self.seeds[index],
            self.positions[index],
            self.drafts[index],
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Per row: `tokens` int64 to produce if the row's draft falls, `stands` bool, `finite` bool (False: the model gave NaN or inf)."""

    tokens: NDArray[np.int64]
    stands: NDArray[np.bool_]
    finite: NDArray[np.bool_]


def verify(logits: torch.Tensor, rows: Rows, attempt: int, draft_probabilities: torch.Tensor | None = None) -> Verdict:
    """Judges all rows of a step with a single read back to the host.

    logits: float32 [R, vocab]. attempt: a number never used before in this run, so that unseeded noise is always fresh.
    draft_probabilities: [R, vocab], what each draft was sampled from; None: all drafters are deterministic.
    """
    peaks = Peaks.of(logits)
    sampled = np.flatnonzero(rows.modes != Mode.GREEDY)
    if not len(sampled):
        return verify_greedy(peaks, rows)
    tokens = peaks.tokens
    stands = tokens == torch.from_numpy(rows.drafts).to(logits.device)
    at_once = max(_NUMBERS_AT_ONCE // logits.shape[1], 1)
    for start in range(0, len(sampled), at_once):
        part = sampled[start : start + at_once]
        for index, distribution in _distributions(logits, rows, part):
            at = torch.from_numpy(index).to(logits.device)
            q = None if draft_probabilities is None else draft_probabilities[at]
            tokens[at], stands[at] = _judge(distribution, rows.take(index), attempt, q)
    packed = torch.stack((tokens, stands.long(), peaks.values.isfinite().long())).cpu().numpy()
    return Verdict(packed[0], packed[1].astype(bool), packed[2].astype(bool))


def verify_greedy(peaks: Peaks, rows: Rows) -> Verdict:
    """`verify` of rows that are all greedy: they need no other logits than the highest."""
    tokens, finite = torch.stack((peaks.tokens, peaks.values.isfinite().long())).cpu().numpy()
    return Verdict(tokens, tokens == rows.drafts, finite.astype(bool))


def accepted_lengths(stands: NDArray[np.bool_], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [S]: how many leading drafts of each sequence stand; its drafts are rows `starts[s]:starts[s] + lengths[s]`."""
    widest = int(lengths.max(initial=0))
    columns = np.arange(widest)
    drafted = columns < lengths[:, None]
    index = np.minimum(starts[:, None] + columns, len(stands) - 1)
    return np.logical_and.accumulate(drafted & stands[index], axis=1).sum(axis=1)


def stochastic(
    distribution: Distribution, drafts: torch.Tensor, q: torch.Tensor | None, uniforms: torch.Tensor, keys_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rejection rule. Returns (tokens if the draft falls, whether it stands), int64 and bool [R].

    drafts: int64 [R], NO_DRAFT where there is none. q: [R, vocab] or None for point masses. uniforms: float64 [R]. keys_: int64 [R].
    """
    p = distribution.probabilities
    drafted = drafts >= 0
    x = drafts.clamp(min=0)
    if q is None:
        ratio = distribution.of(x)
        columns = torch.arange(p.shape[1], device=p.device)[None] if distribution.ids is None else distribution.ids
        residual = p.masked_fill((columns == x[:, None]) & drafted[:, None], 0.0)
    else:
        ratio = distribution.of(x) / q.gather(1, x[:, None])[:, 0]
        residual = torch.where(drafted[:, None], (p - distribution.weigh(q)).clamp(min=0.0), p)
    return draw(residual, distribution.ids, keys_), drafted & (uniforms < ratio)


def _distributions(logits: torch.Tensor, rows: Rows, index: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], Distribution]]:
    """Splits sampled rows by how much of the vocabulary must be looked at."""
    found = []
    cut = (rows.top_ks[index] > 0) | (rows.top_ps[index] < 1.0)
    if len(whole := index[~cut]):
        found.append((whole, temper(_select(logits, whole), _column(rows.temperatures, whole, logits))))
    width = narrow_width(logits.shape[1], logits.device)
    index = index[cut]
    while len(index):
        temperature, top_k, top_p = (_column(values, index, logits) for values in (rows.temperatures, rows.top_ks, rows.top_ps))
        distribution, enough = truncate(_select(logits, index), temperature, top_k, top_p, width)
        if width == logits.shape[1] or bool(enough.all()):
            found.append((index, distribution))
            break
        mask = enough.cpu()
        assert distribution.ids is not None
        found.append((index[mask.numpy()], Distribution(distribution.probabilities[enough], distribution.ids[enough])))
        index = index[~mask.numpy()]
        width = logits.shape[1]
    return found


def _judge(distribution: Distribution, rows: Rows, attempt: int, q: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    device = distribution.probabilities.device
    seeded = rows.modes == Mode.SEEDED
    resample = keys(rows.seeds, rows.positions, Stream.RESAMPLE, attempt=attempt)
    row_keys = np.where(seeded, keys(rows.seeds, rows.positions, Stream.TOKEN), resample).view(np.int64)
    uniforms = uniform(keys(rows.seeds, rows.positions, Stream.ACCEPT, attempt=attempt))
    drafts = torch.from_numpy(rows.drafts).to(device)
    # A seeded row draws from p itself: hiding its draft makes the rule do so.
    hidden = torch.from_numpy(np.where(seeded, NO_DRAFT, rows.drafts)).to(device)
    tokens, stands = stochastic(distribution, hidden, q, torch.from_numpy(uniforms).to(device), torch.from_numpy(row_keys).to(device))
    return tokens, torch.where(torch.from_numpy(seeded).to(device), tokens == drafts, stands)


def _select(logits: torch.Tensor, index: NDArray[np.int64]) -> torch.Tensor:
    return logits[torch.from_numpy(index).to(logits.device)]


def _column(values: NDArray[np.generic], index: NDArray[np.int64], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values[index]).to(like.device)
