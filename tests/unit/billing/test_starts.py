"""From submission to the first result: the parts sum to the whole, whoever was up first."""

from datetime import UTC, datetime, timedelta

from service.billing.report_rows import start_row
from service.billing.starts import StartTimes, split

T0 = datetime(2026, 3, 1, tzinfo=UTC)
SECOND = 10**9


def times(**changes):
    values = {
        "submitted_at": T0,
        "due_at": T0 + timedelta(seconds=1),
        "claimed_at": T0 + timedelta(seconds=5),
        "first_result_at": T0 + timedelta(seconds=20),
        "spawn_ns": 3 * SECOND,
        "load_ns": 6 * SECOND,
        "profile_ns": 2 * SECOND,
        "prefill_ns": 1 * SECOND,
        "decode_ns": 5 * SECOND,
    }
    return StartTimes(**{**values, **changes})


def test_every_second_has_a_name():
    parts = split(times())
    assert parts.total == 20 * SECOND
    assert (parts.validate, parts.wait, parts.spawn) == (1 * SECOND, 1 * SECOND, 3 * SECOND)
    assert parts.other == 1 * SECOND
    row = start_row("w", "m", "batch_1", True, None, parts)
    assert sum(row[f"{name}_seconds"] for name in ("validate", "wait", "spawn", "load", "profile", "prefill", "decode", "other")) == 20
    assert row["total_seconds"] == 20


def test_a_worker_that_was_up_before_the_job_was_not_waited_for():
    parts = split(times(spawn_ns=100 * SECOND, claimed_at=T0 + timedelta(seconds=1.5)))
    assert (parts.wait, parts.spawn) == (0, SECOND // 2)
    assert split(times(claimed_at=T0)).spawn == 0, "claimed before the batch says that it is due: clocks of transactions"
