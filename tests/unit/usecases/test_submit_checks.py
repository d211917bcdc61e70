"""Windows, filenames, expiry, progress: the pure parts of submitting and watching."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from service.domain.job import Batch, BatchStatus
from service.domain.usage import Work
from service.errors import InvalidRequest
from service.usecases.files import check_expiry, check_filename, check_purpose
from service.usecases.keys import digest_of
from service.usecases.status import progress
from service.usecases.submit import parse_window

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24h", timedelta(days=1)), ("1m", timedelta(minutes=1)), ("72h", timedelta(days=3)), ("30d", timedelta(days=30))],
)
def test_a_window_is_a_number_and_a_unit(text: str, expected: timedelta) -> None:
    assert parse_window(text) == expected


@pytest.mark.parametrize("text", ["", "24", "h", "24H", " 24h", "24h\n", "-1h", "0m", "31d", "721h", "1.5h", "24s", "9999999h", "٢٤h"])
def test_another_window_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_window(text)
    assert refusal.value.param == "completion_window"


@pytest.mark.parametrize("name", ["in.jsonl", "mein Job (2).jsonl", "作業.jsonl", "..hidden", "a..b", "100%.jsonl", "x" * 512])
def test_ordinary_names_pass(name: str) -> None:
    assert check_filename(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../etc/passwd", "/etc/passwd", "a/b", "a\\b", "a\0b", "a%00b", "%2e%2e%2fetc", "a\nb", "a\x7fb", "x" * 513],
)
def test_names_that_look_like_paths_or_hide_characters_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_filename(name)


def test_only_the_purpose_batch_is_taken() -> None:
    assert check_purpose("batch") == "batch"
    for bad in (None, "", "batch_output", "fine-tune", "Batch"):
        with pytest.raises(InvalidRequest) as refusal:
            check_purpose(bad)
        assert refusal.value.param == "purpose"


def test_expiry_needs_both_parts_and_a_range() -> None:
    assert check_expiry(None, None) is None
    assert check_expiry("created_at", "3600") == timedelta(hours=1)
    for anchor, seconds in [
        ("created_at", None),
        (None, "3600"),
        ("now", "3600"),
        ("created_at", "3599"),
        ("created_at", "2592001"),
        ("created_at", "-3600"),
        ("created_at", "36e2"),
        ("created_at", "٣٦٠٠"),
        ("created_at", "9" * 5000),
    ]:
        with pytest.raises(InvalidRequest):
            check_expiry(anchor, seconds)


def test_a_digest_depends_on_secret_and_pepper() -> None:
    digests = {digest_of(secret, pepper) for secret in ("one", "two") for pepper in ("", "salt", "x" * 200)}
    assert len(digests) == 6


def test_progress_while_running_and_after() -> None:
    batch = Batch(
        id="batch_1",
        project_id="proj_1",
        endpoint="/v1/completions",
        completion_window="24h",
        created_at=NOON,
        expires_at=NOON + timedelta(days=1),
        price_version=1,
        status=BatchStatus.IN_PROGRESS,
        in_progress_at=NOON,
        total=100,
        completed=20,
        failed=5,
    )
    now = NOON.timestamp() + 50
    running = progress(batch, Work(sampled=300, steps=120), now, 41.26)
    assert (running.lines_done, running.tokens_per_second, running.eta_seconds, running.acceptance_length) == (25, 41.3, 150, 2.5)
    fresh = progress(batch.evolve(completed=0, failed=0), Work(), now, 0.0)
    assert (fresh.lines_done, fresh.eta_seconds, fresh.acceptance_length) == (0, None, None)
    ended = progress(batch.evolve(status=BatchStatus.COMPLETED), Work(sampled=300, steps=120), now, 41.26)
    assert (ended.lines_done, ended.tokens_per_second, ended.eta_seconds, ended.acceptance_length) == (25, None, None, 2.5)
