"""Counter-based noise: distribution, independence of streams, and that it belongs to (key, token) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.noise import Stream, exponential, keys, uniform


def row_keys(count: int, stream: Stream = Stream.TOKEN, attempt: int = 0) -> np.ndarray:
    return keys(np.full(count, 7, np.uint64), np.arange(count), stream, attempt=attempt)


def test_uniforms_are_uniform() -> None:
    values = uniform(row_keys(200_000))
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    statistic = ((counts - 2000) ** 2 / 2000).sum()
    assert 50 < statistic < 160  # chi-square with 99 degrees of freedom: p between 1e-4 and 1 - 1e-4


def test_noise_over_the_vocabulary_is_standard_exponential() -> None:
    noise = exponential(torch.from_numpy(row_keys(40).view(np.int64)), torch.arange(50_000)).double().numpy()
    assert noise.min() > 0
    assert np.isfinite(noise).all()
    share = 1 - np.exp(-noise.ravel())
    counts = np.histogram(share, bins=100, range=(0, 1))[0]
    statistic = ((counts - 20_000) ** 2 / 20_000).sum()
    assert 50 < statistic < 160
    assert (noise < 1e-6).mean() == pytest.approx(1e-6, rel=1.0)


def test_rows_positions_tokens_streams_and_attempts_are_uncorrelated() -> None:
    tokens = torch.arange(50_000)
    base = exponential(torch.from_numpy(row_keys(3).view(np.int64)), tokens).double().numpy()
    other = exponential(torch.from_numpy(row_keys(3, Stream.RESAMPLE).view(np.int64)), tokens).double().numpy()
    again = exponential(torch.from_numpy(row_keys(3, attempt=1).view(np.int64)), tokens).double().numpy()
    pairs = [(base[0], base[1]), (base[1], base[2]), (base[0], other[0]), (base[0], again[0]), (base[0][:-1], base[0][1:])]
    for left, right in pairs:
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.02  # 4.5 standard deviations


def test_noise_belongs_to_the_token_not_to_its_column() -> None:
    key = torch.from_numpy(row_keys(2).view(np.int64))
    ids = torch.tensor([[5, 900, 17], [17, 5, 3]])
    whole = exponential(key, torch.arange(1000))
    assert torch.equal(exponential(key, ids), whole.gather(1, ids))
