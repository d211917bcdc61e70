"""What walks rows of logits: verification, log-probabilities, and the count of drafts that stand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from kernels.testing import Case, poisoned_allocations
from tests.unit.kernels.triton.cases.common import Results


def vocabulary_cases(*, full: bool) -> Iterator[Case]:
    sizes = ((9, 1300), (64, 151_936), (5, 262_144)) if full else ((9, 1300),)
    for rows, vocab in sizes:
        for kind in ("no drafts", "certain drafts", "drawn drafts", "biases", "penalties", "allowed tokens", "everything"):
            for dtype in (torch.float32, torch.bfloat16) if full else (torch.float32,):
                yield Case("verify", f"{kind}, {rows}x{vocab}, {str(dtype)[6:]}", partial(_verify, rows, vocab, kind, dtype))
        yield Case("token_log_probs", f"{rows}x{vocab}", partial(_log_probs, rows, vocab, 3 if not full else 20), 1e-5)
    # A threshold among few numbers, among more than there is room for, and among numbers that are all alike.
    for room in (8, 64):
        yield Case("verify", f"flat rows, cut with room for {room}", partial(_cut, room))
    yield Case("verify", "rows that are not finite", _not_finite)
    yield Case("verify", "the noise of all rows is the reference's", _same_noise)
    yield Case("accept_drafts", "5 sequences", partial(_accept, tallied=False))
    yield Case("accept_drafts", "5 sequences, counted", partial(_accept, tallied=True))


def sample_rows(rows: int, vocab: int, device: torch.device, *, drafts: bool) -> Any:
    """Rows of every mode and every kind of cut, in turn."""
    from kernels.reference.sampling import SampleRows

    index = torch.arange(rows, device=device)
    return SampleRows(
        (index % 3).to(torch.int32),
        torch.rand(rows, device=device) + 0.3,
        torch.tensor([0, 1, 5, 50], device=device)[index % 4].to(torch.int32),
        torch.tensor([1.0, 0.9, 0.5, 1.0, 0.3], device=device)[index % 5],
        torch.randint(-(2**62), 2**62, (rows,), device=device),
        torch.randint(0, 999, (rows,), device=device),
        torch.randint(0, vocab, (rows,), device=device) if drafts else torch.full((rows,), -1, device=device),
    )


def _verify(rows: int, vocab: int, kind: str, dtype: torch.dtype, device: torch.device) -> Results:
    from kernels.reference.sampling import Allowed, Biases, DraftWeights, Penalties
    from kernels.reference.sampling import verify as reference
    from kernels.triton.sampling import verify

    # No two logits alike: where bfloat16 ties the two largest, either is right, and this is not the place to say so.
    logits = (3.0 * torch.randn(rows, vocab, device=device)).to(dtype)
    logits[torch.arange(rows), torch.randint(0, vocab, (rows,), device=device)] += 20.0
    what = sample_rows(rows, vocab, device, drafts=kind != "no drafts")
    if kind != "no drafts":
        what.drafts[::2] = logits.argmax(1)[::2]
    options: dict[str, Any] = {}
    words = -(-vocab // 32)

    def bits() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (4, words), device=device).to(torch.int32)

    lines = (torch.arange(rows, device=device) % 4).to(torch.int32)
    if kind in ("drawn drafts", "everything"):
        weights = logits.float() * 0.7 + torch.randn(rows, vocab, device=device)
        options["draft"] = DraftWeights(weights, weights.logsumexp(1))
    if kind in ("biases", "everything"):
        values = torch.randn(4, vocab, device=device) * 3.0
        values[torch.rand(4, vocab, device=device) < 0.1] = -torch.inf
        options["biases"] = Biases(values, lines.flip(0) - 1)
    if kind in ("penalties", "everything"):
        counts = torch.randint(0, 3, (4, vocab), device=device).to(torch.int32)
        strength = [torch.rand(rows, device=device) for _ in range(3)]
        options["penalties"] = Penalties(counts, bits(), (lines + 1) % 4 - 1, strength[0], strength[1], strength[2] + 1.0, lines)
    if kind in ("allowed tokens", "everything"):
        options["allowed"] = Allowed(bits(), lines - 1)
    attempt = torch.tensor([77], device=device)
    exact = reference(logits.double(), what, attempt, **options)
    with poisoned_allocations():
        made = verify(logits, what, attempt, **options)
    return (made.tokens, made.stands, made.finite), (exact.tokens, exact.stands, exact.finite)


def _cut(room: int, device: torch.device) -> Results:
    """Numbers so close that the first walks leave many of them, in steps that are narrower than the row."""
    from kernels.reference.sampling import verify as reference
    from kernels.triton import sampling

    logits = 0.01 * torch.randn(9, 700, device=device)
    logits[3:6] = logits[3:6].abs().round(decimals=3) - 30.0
    logits[6:] = 0.0
    what = sample_rows(9, 700, device, drafts=True)
    what.modes.fill_(2)
    what.top_ks.copy_(torch.tensor([0, 40, 400], device=device).repeat(3))
    what.top_ps.copy_(torch.tensor([0.9, 1.0, 0.7], device=device).repeat(3))
    attempt = torch.tensor([5], device=device)
    exact = reference(logits.double(), what, attempt)
    with mock.patch.multiple(sampling, _BLOCK=256, _ROOM=room, _WARPS=4), poisoned_allocations():
        made = sampling.verify(logits, what, attempt)
    return (made.tokens, made.stands), (exact.tokens, exact.stands)


def _not_finite(device: torch.device) -> Results:
    from kernels.triton.sampling import verify

    logits = torch.randn(4, 40, device=device)
    logits[0, 3], logits[1, 39], logits[2] = float("nan"), float("inf"), float("-inf")
    made = verify(logits, sample_rows(4, 40, device, drafts=True), torch.tensor([1], device=device))
    return (made.finite,), (torch.tensor([False, False, False, True], device=device),)


def _same_noise(device: torch.device) -> Results:
    """All logits equal, so that noise alone decides: a single wrong bit of it would show."""
    from kernels.reference.sampling import verify as reference
    from kernels.triton.sampling import verify

    what = sample_rows(30, 300, device, drafts=True)
    what.top_ks.zero_()
    what.top_ps.fill_(1.0)
    logits, attempt = torch.zeros(30, 300, device=device), torch.tensor([5], device=device)
    made, exact = verify(logits, what, attempt), reference(logits.double(), what, attempt)
    return (made.tokens, made.stands), (exact.tokens, exact.stands)


def _log_probs(rows: int, vocab: int, top: int, device: torch.device) -> Results:
    from kernels.reference.sampling import token_log_probs as reference
    from kernels.triton.sampling import token_log_probs

    logits, tokens = 3.0 * torch.randn(rows, vocab, device=device), torch.randint(0, vocab, (rows,), device=device)
    logits[0, 5] = logits[0, 9] = 40.0  # equal ones by id
    wanted = torch.randint(0, rows, (rows + 3,), device=device)
    wanted[0] = 0
    tokens = tokens[wanted]
    exact = reference(logits.double(), wanted, tokens, top)
    with poisoned_allocations():
        made = token_log_probs(logits, wanted, tokens, top)
    return (made[0], made[2], made[1]), (exact[0], exact[2], exact[1])


def _accept(device: torch.device, *, tallied: bool) -> Results:
    from kernels.reference.sampling import Tally, Verdict
    from kernels.reference.sampling import accept_drafts as reference
    from kernels.triton.sampling import accept_drafts

    finite = torch.ones(30, dtype=torch.bool, device=device)
    finite[13] = False
    verdict = Verdict(torch.randint(0, 99, (30,), device=device), torch.rand(30, device=device) < 0.7, finite)
    bounds = torch.tensor([0, 4, 5, 5, 12, 30], dtype=torch.int32, device=device)
    counts = [torch.ones(3, 99, dtype=torch.int32, device=device) for _ in range(2)]
    drafts = torch.randint(0, 9, (30,), device=device)  # few, so that some are counted twice
    lines = torch.tensor([2, -1, 1, -1, 0], dtype=torch.int32, device=device)
    tallies = [Tally(held, lines, drafts) if tallied else None for held in counts]
    with poisoned_allocations():
        made = accept_drafts(verdict, bounds, tallies[0])
    exact = reference(verdict, bounds, tallies[1])
    return (made, counts[0]), (exact, counts[1])
