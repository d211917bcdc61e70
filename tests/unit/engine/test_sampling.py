"""Processed distributions against transformers' own warpers, and drawing from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.sampling import Distribution, draw, temper, truncate


def reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, logits.clone()) if temperature != 1.0 else logits.clone()
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(-1)


def dense(distribution: Distribution, vocab: int) -> torch.Tensor:
    if distribution.ids is None:
        return distribution.probabilities
    return torch.zeros(len(distribution.ids), vocab).scatter_add_(1, distribution.ids, distribution.probabilities)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.2), (5, 1.0), (40, 0.8), (3, 0.999), (1, 0.5), (500, 0.95), (0, 0.9999)])
@pytest.mark.parametrize("width", [64, 777])
def test_truncation_equals_transformers_wherever_the_width_was_enough(temperature: float, top_k: int, top_p: float, width: int) -> None:
    vocab = 777
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(3)) * 4
    rows = (torch.full((6,), temperature), torch.full((6,), top_k), torch.full((6,), top_p))
    got, enough = truncate(logits, *rows, width)
    assert width < vocab or enough.all()
    want = reference(logits, temperature, top_k, top_p)
    torch.testing.assert_close(dense(got, vocab)[enough], want[enough], atol=2e-6, rtol=1e-4)


def test_a_width_that_cuts_into_the_nucleus_is_reported() -> None:
    logits = torch.zeros(1, 100)
    _, enough = truncate(logits, torch.ones(1), torch.zeros(1, dtype=torch.long), torch.tensor([0.9]), 50)
    assert not enough.any()


def test_tokens_tied_with_the_kth_stay_in() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    got, _ = truncate(logits, torch.ones(1), torch.tensor([2]), torch.ones(1), 5)
    torch.testing.assert_close(dense(got, 5), reference(logits, 1.0, 2, 1.0))


def test_plain_temperature_equals_transformers() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(temper(logits, torch.full((3,), 0.7)).probabilities, reference(logits, 0.7, 0, 1.0))


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02, 0.0])
    count = 40_000
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, count))
    drawn = draw(weights.expand(count, -1), None, keys)
    counts = torch.bincount(drawn, minlength=6).double()
    assert counts[5] == 0
    statistic = ((counts[:5] - count * weights[:5]) ** 2 / (count * weights[:5])).sum()
    assert statistic < 23.5  # 4 degrees of freedom, p = 1e-4


def test_draws_do_not_depend_on_how_the_row_was_cut() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(20, 300, generator=generator) * 3
    keys = torch.randint(-(2**62), 2**62, (20,), generator=generator)
    rows = (torch.ones(20), torch.full((20,), 10), torch.ones(20))
    narrow, _ = truncate(logits, *rows, 32)
    wide, _ = truncate(logits, *rows, 300)
    assert torch.equal(draw(narrow.probabilities, narrow.ids, keys), draw(wide.probabilities, wide.ids, keys))
