"""Calibration: what a fit repairs, and the measures it is judged by."""

from __future__ import annotations

import numpy as np
import pytest

from engine.drafters.parts.confidence import sigmoid
from engine.training.calibrate import area, expected_error, fit, quality, survival


def test_sequential_temperature_scaling_repairs_overconfidence() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0.8, 1.2, (6000, 4))
    stood = np.cumprod(rng.random((6000, 4)) < sigmoid(true), axis=1).astype(float)
    logits = true * np.array([3.0, 2.0, 1.0, 0.5]) + np.array([0.0, 0.9, 0.0, -0.4])
    evidence = np.stack([logits, rng.normal(0.0, 1.0, logits.shape)], -1)  # the sharpness says nothing here
    scales = fit(evidence[:3000], stood[:3000])
    assert scales[0, :2] == pytest.approx([3.0, 2.0], rel=0.25)
    assert scales[1, :2] == pytest.approx([0.0, 0.9], abs=0.25)
    assert scales[2, :2].max() <= 0.25
    before, after = (quality(survival(evidence[3000:], one), stood[3000:]) for one in (None, scales))
    assert after.ece.max() < 0.04 < before.ece.max()
    assert (after.brier < after.base_brier).all()
    assert (after.auc > 0.7).all()


@pytest.mark.parametrize("confident", [True, False])
def test_calibration_weighs_the_sharpness_by_what_it_tells(confident: bool) -> None:
    """A head that knows half of the truth, or one that is not there; the other half is in how sharp the draft is."""
    rng = np.random.default_rng(0)
    parts = rng.normal(0.3, 1.5, (8000, 3, 2))
    if not confident:
        parts[..., 0] = 0.0
    stood = np.cumprod(rng.random((8000, 3)) < sigmoid(parts @ np.array([1.0, 2.0]) - 0.5), axis=1).astype(float)
    scales = fit(parts[:4000], stood[:4000])
    if confident:
        assert scales[2, :2] == pytest.approx([2.0, 2.0], abs=0.5)
    with_it, without = (quality(survival(parts[4000:], one), stood[4000:]) for one in (scales, scales * np.array([[1.0], [1.0], [0.0]])))
    assert with_it.ece.max() < 0.04
    assert (with_it.auc > without.auc + 0.1).all()


def test_measures_of_calibration_by_hand() -> None:
    assert expected_error(np.full(30, 0.5), np.tile([0.0, 1.0], 15)) == pytest.approx(0.0, abs=0.51)
    assert expected_error(np.full(15, 0.9), np.zeros(15)) == pytest.approx(0.9)
    assert area(np.array([0.1, 0.4, 0.8]), np.array([0.0, 1.0, 1.0])) == 1.0
    assert area(np.array([0.5, 0.5]), np.array([0.0, 1.0])) == 0.5
    assert np.isnan(area(np.array([0.5]), np.array([1.0])))
