"""The operator's view: rates by device class, cost to the last digit, sums that know what they do not know."""

from __future__ import annotations

from fractions import Fraction

import pytest

from service.billing.operator import CostLine, HourlyRates, WorkerLine, total
from service.billing.report_rows import cost_row
from service.domain.usage import Work
from service.errors import ConfigError

RATES = HourlyRates.parse({"cpu": "0.10", "cuda": "2", "NVIDIA H200": "3.499999999999999"})


@pytest.mark.parametrize(
    ("device", "femto"),
    [
        ("cpu", 10**14),
        ("cuda (NVIDIA H200)", 3_499_999_999_999_999),
        ("cuda (NVIDIA L4)", 2 * 10**15),
        ("CPU", 10**14),
        ("tpu", None),
        ("", None),
    ],
)
def test_a_device_has_the_rate_of_its_name_or_else_of_its_kind(device: str, femto: int | None) -> None:
    assert RATES.of(device) == femto


@pytest.mark.parametrize("text", ["1e2", "-1", "free", "0.1234567890123456"])
def test_rates_are_exact_or_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cpu"):
        HourlyRates.parse({"cpu": text})


def test_a_nanosecond_has_an_exact_price() -> None:
    assert RATES.cost("cpu", 1) == Fraction(10**14, 3_600 * 10**9)
    assert RATES.cost("cpu", 3_600 * 10**9) == 10**14
    assert RATES.cost("tpu", 1) is None


def line(key: str, price: int, cost: Fraction | None) -> CostLine:
    return CostLine((key,), 1, 600_000, 0, 400_000, price, cost, Work(decode_ns=5))


def test_margins_and_prices_per_million() -> None:
    row = cost_row(line("a", 3 * 10**15, Fraction(10**15, 3)), ["model"])
    assert (row["model"], row["price"], row["cost"]) == ("a", "3", "0.333333333333333")
    assert row["margin"] == "2.666666666666667"
    assert (row["price_per_million"], row["cost_per_million"]) == ("3", "0.333333333333333")


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    known = [line("a", 1, Fraction(1, 3)), line("b", 2, Fraction(2, 3))]
    assert (total(known).cost, total(known).price, total(known).work.decode_ns) == (1, 3, 10)
    assert total([*known, line("c", 1, None)]).cost is None
    assert total([]).price == 0


def test_lost_and_unaccounted_time() -> None:
    worker = WorkerLine("w", "cpu", wall_ns=1000, busy_ns=500, attributed_ns=450, load_ns=100, profile_ns=50, idle_ns=340, cost=None)
    assert (worker.lost_ns, worker.unaccounted) == (50, 0.01)
