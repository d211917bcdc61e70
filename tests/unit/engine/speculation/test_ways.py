"""Two ways to decode: both are tried, the faster is kept, and the other gets another chance."""

from __future__ import annotations

import numpy as np

from engine.speculation.ways import Ways


def run(ways: Ways, steps: int, rates: tuple[float, float], requests: int = 6) -> np.ndarray:
    """Which way each step went; rates: tokens a second between steps and inside them. Now and then a step takes very long."""
    went = np.zeros(steps, bool)
    for step in range(steps):
        went[step] = ways.on_device(requests)
        seconds = 10.0 / rates[int(went[step])]
        ways.add(on_device=bool(went[step]), requests=requests, tokens=10, seconds=50 * seconds if step % 97 == 5 else seconds)
    return went


def test_the_faster_way_is_found_and_kept() -> None:
    for rates, device in (((100.0, 130.0), True), ((130.0, 100.0), False)):
        went = run(Ways(), 4000, rates)
        assert went[:16].all()
        assert not went[16:32].any()
        assert (went[32:] == device).mean() > 0.97
        assert (went[32:] != device).any(), "the other way is tried again"


def test_a_way_that_became_faster_is_taken() -> None:
    ways = Ways()
    run(ways, 600, (100.0, 60.0))
    went = run(ways, 3000, (100.0, 200.0))
    assert went[-200:].all()


def test_batches_of_other_sizes_are_judged_by_themselves() -> None:
    ways = Ways()
    assert not run(ways, 100, (100.0, 50.0), requests=40)[-1]
    assert run(ways, 100, (10.0, 50.0), requests=2)[-1]
    assert not ways.on_device(33)
    assert ways.on_device(2)
    assert ways.on_device(1), "nothing is known of it: the device first"
