"""The billing oracles after arbitrary sequences of events; `make acceptance` runs two thousand of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.integration.jobs import settings_for
from tests.sequences import machine

SEQUENCES = 30


def test_the_bill_holds_after_whatever_happened(database: Any, tmp_path: Path) -> None:
    chosen = settings(
        max_examples=SEQUENCES, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    bound = machine(database, settings_for(tmp_path))
    run_state_machine_as_test(bound, settings=chosen)  # type: ignore[no-untyped-call]
    assert bound.reversals >= SEQUENCES // 3
