"""What a verified step teaches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from engine.speculation.proposal import Proposal
from engine.speculation.track_record import TrackRecord


def settle(record: TrackRecord, slots: list[int], accepted: list[int]) -> None:
    sequences = cast("Any", [SimpleNamespace(slot=slot) for slot in slots])
    counts = np.array(accepted)
    record.settle(Proposal.empty(len(slots)), sequences, counts, counts, cast("Any", None))


def test_a_pace_nears_the_tokens_a_step_and_begins_anew_with_the_next_request() -> None:
    record = TrackRecord(3)
    for _ in range(200):
        settle(record, [0, 2], [3, 1])
    assert np.allclose(record.paces(np.array([0, 1, 2])), [4.0, 1.0, 2.0], atol=1e-3)
    record.enter(0, [])
    assert record.paces(np.array([0, 2])).tolist() == [1.0, record.paces(np.array([2]))[0]]


def test_what_became_of_a_request_that_has_left_its_slot_is_nobodys_pace() -> None:
    record = TrackRecord(3)
    settle(record, [0, -1], [1, 7])
    assert record.paces(np.array([1, 2])).tolist() == [1.0, 1.0]
    assert record.paces(np.array([0]))[0] > 1.0
