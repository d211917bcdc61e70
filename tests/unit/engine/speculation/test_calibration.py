"""Survival estimates against drafters whose true acceptance is known."""

from __future__ import annotations

import numpy as np
import pytest

from engine.speculation.calibration import Calibration, Discount


def feed(calibration: Calibration, rates: np.ndarray, slots: int, steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    bins = np.tile(np.arange(len(rates)), (slots, 1))
    for _ in range(steps):
        stands = rng.random((slots, len(rates))) < rates
        stood = np.logical_and.accumulate(stands, axis=1).sum(axis=1)
        calibration.observe(np.arange(slots), bins, stood, np.minimum(stood + 1, len(rates)))


def test_conditional_rates_are_learned_from_what_was_decided() -> None:
    rates = np.array([0.9, 0.7, 0.4])
    calibration = Calibration(np.full(3, 0.5), slots=8)
    feed(calibration, rates, 8, 300)
    for slot in range(8):
        calibration.reset(slot)
    survival = calibration.survival(np.array([0]), np.array([[0, 1, 2]]))[0]
    assert survival == pytest.approx(np.cumprod(rates), abs=0.05)


def test_a_request_that_always_fails_is_trusted_less_than_its_neighbour() -> None:
    calibration = Calibration(np.full(1, 0.7), slots=2)
    bins = np.zeros((2, 1), np.int64)
    for _ in range(20):
        calibration.observe(np.array([0, 1]), bins, np.array([0, 1]), np.array([1, 1]))
    survival = calibration.survival(np.array([0, 1]), bins)
    assert survival[0, 0] < 0.5 * survival[1, 0]
    calibration.reset(0)
    assert calibration.survival(np.array([0]), bins[:1])[0, 0] == pytest.approx(0.55, abs=0.12)


def test_one_requests_luck_moves_every_bin_by_the_same_odds() -> None:
    rates = np.array([0.9, 0.5])
    calibration = Calibration(rates, slots=2, strength=1e9)
    bins = np.zeros((1, 1), np.int64)
    for _ in range(60):
        calibration.observe(np.array([0]), bins, np.array([0]), np.array([1]))
    shift = calibration.shifts(np.array([0, 1]))
    assert -4.0 < shift[0] < -2.0
    assert shift[1] == 0.0
    chance = [calibration.survival(np.array([0]), np.array([[index]]))[0, 0] for index in (0, 1)]
    assert [p / (1 - p) for p in chance] == pytest.approx([9.0 * np.exp(shift[0]), np.exp(shift[0])])


def test_nothing_is_survived_past_the_last_draft() -> None:
    calibration = Calibration(np.full(4, 0.9), slots=1)
    assert calibration.survival(np.array([0]), np.array([[0, 1, -1, -1]]))[0, 2:].tolist() == [0.0, 0.0]


def test_old_outcomes_fade() -> None:
    calibration = Calibration(np.full(1, 0.5), slots=4, memory=200.0)
    feed(calibration, np.array([1.0]), 4, 300)
    feed(calibration, np.array([0.0]), 4, 300)
    calibration.reset(0)
    assert calibration.survival(np.array([0]), np.array([[0]]))[0, 0] < 0.05


def test_the_most_promising_of_many_estimates_are_discounted_to_what_they_keep() -> None:
    rng = np.random.default_rng(1)
    discount = Discount()
    for _ in range(200):
        estimates = np.clip(0.6 + 0.2 * rng.standard_normal(64), 0.0, 1.0)  # the truth is 0.6 everywhere
        chosen = np.sort(estimates)[-16:]
        discount.observe(float(chosen.sum()), float((rng.random(16) < 0.6).sum()))
    assert discount.factor * chosen.mean() == pytest.approx(0.6, abs=0.06)
    for _ in range(1000):
        discount.observe(0.0, 0.0)
    assert discount.factor == pytest.approx(1.0, abs=0.01)  # old evidence fades


def test_promises_that_are_kept_are_not_discounted() -> None:
    discount = Discount()
    for _ in range(50):
        discount.observe(10.0, 11.0)
    assert discount.factor == 1.0
