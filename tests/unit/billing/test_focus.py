"""FOCUS 1.2: every column's type, nullability and allowed values, and the rules between columns, from a table written down here."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.adapters.focus_files import write_focus
from service.billing.focus import COLUMNS, exact, focus_row
from service.domain.money import ChargeDetail, LedgerKind, Meter
from service.errors import InvalidRequest

_CHARGE = {"ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd", "ChargePeriodStart"}
_BILLING = {"BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart"}
_COST = {"BilledCost", "ContractedCost", "EffectiveCost", "ListCost", "PricingQuantity", "PricingUnit"}
_SERVICE = {"InvoiceIssuerName", "ProviderName", "PublisherName", "ServiceCategory", "ServiceName"}
MANDATORY = _CHARGE | _BILLING | _COST | _SERVICE


@dataclass(frozen=True)
class Rule:
    """What the specification says of one column."""

    type: type
    nullable: bool = False
    allowed: str | None = None
    """A regular expression that the whole text must match."""


_SERVICE_CATEGORIES = (
    "AI and Machine Learning|Analytics|Business Applications|Compute|Databases|Developer Tools|Multicloud|Identity|Integration|"
    "Internet of Things|Management and Governance|Media|Migration|Mobile|Networking|Security|Storage|Web|Other"
)
_UNIT = r"([1-9][0-9]* )?[A-Z][A-Za-z]*s"
RULES = {
    "BilledCost": Rule(Decimal),
    "BillingAccountId": Rule(str),
    "BillingAccountName": Rule(str, nullable=True),
    "BillingCurrency": Rule(str, allowed="[A-Z]{3}"),
    "BillingPeriodEnd": Rule(datetime),
    "BillingPeriodStart": Rule(datetime),
    "ChargeCategory": Rule(str, allowed="Usage|Purchase|Tax|Credit|Adjustment"),
    "ChargeClass": Rule(str, nullable=True, allowed="Correction"),
    "ChargeDescription": Rule(str, nullable=True),
    "ChargeFrequency": Rule(str, allowed="One-Time|Recurring|Usage-Based"),
    "ChargePeriodEnd": Rule(datetime),
    "ChargePeriodStart": Rule(datetime),
    "ConsumedQuantity": Rule(Decimal, nullable=True),
    "ConsumedUnit": Rule(str, nullable=True, allowed=_UNIT),
    "ContractedCost": Rule(Decimal),
    "ContractedUnitPrice": Rule(Decimal, nullable=True),
    "EffectiveCost": Rule(Decimal),
    "InvoiceIssuerName": Rule(str),
    "ListCost": Rule(Decimal),
    "ListUnitPrice": Rule(Decimal, nullable=True),
    "PricingCategory": Rule(str, nullable=True, allowed="Standard|Dynamic|Committed|Other"),
    "PricingQuantity": Rule(Decimal, nullable=True),
    "PricingUnit": Rule(str, nullable=True, allowed=_UNIT),
    "ProviderName": Rule(str),
    "PublisherName": Rule(str),
    "ResourceId": Rule(str, nullable=True),
    "ResourceType": Rule(str, nullable=True),
    "ServiceCategory": Rule(str, allowed=_SERVICE_CATEGORIES),
    "ServiceName": Rule(str),
    "ServiceSubcategory": Rule(str, allowed="Generative AI"),
    "SkuId": Rule(str, nullable=True),
    "SkuMeter": Rule(str, nullable=True),
    "SkuPriceId": Rule(str, nullable=True),
    "Tags": Rule(dict, nullable=True),
}


def problems(row: dict[str, Any]) -> list[str]:
    """What the specification finds wrong with a row."""
    found = [f"{name} is missing" for name in (MANDATORY | set(RULES)) - set(row)]
    found += [f"{name} is neither the specification's nor x_" for name in row if name not in RULES and not name.startswith("x_")]
    for name, rule in RULES.items():
        value = row.get(name)
        if value is None:
            found += [] if rule.nullable else [f"{name} is null"]
        elif not isinstance(value, rule.type):
            found.append(f"{name} is {value!r}, not {rule.type.__name__}")
        elif rule.type is str and (not value or (rule.allowed and not re.fullmatch(rule.allowed, value))):
            found.append(f"{name} is {value!r}")
        elif isinstance(value, datetime) and value.utcoffset() != timedelta(0):
            found.append(f"{name} is not in UTC")
    return found + between(row)


def between(row: dict[str, Any]) -> list[str]:
    """Rules between columns."""
    quantity = row["PricingQuantity"]
    tokens = int(row["PricingUnit"].split()[0]) if " " in row["PricingUnit"] else 1
    rules = {
        "a charge lies in its billing period": row["BillingPeriodStart"] <= row["ChargePeriodStart"]
        and row["ChargePeriodEnd"] <= row["BillingPeriodEnd"],
        "periods are not empty": row["ChargePeriodStart"] < row["ChargePeriodEnd"],
        "list cost = list unit price x pricing quantity": row["ListCost"] == row["ListUnitPrice"] * quantity,
        "contracted cost = contracted unit price x pricing quantity": row["ContractedCost"] == row["ContractedUnitPrice"] * quantity,
        "consumed and pricing quantity count the same": row["ConsumedQuantity"] == quantity * tokens,
        "unit prices are not negative": row["ListUnitPrice"] >= 0 and row["ContractedUnitPrice"] >= 0,
        "a unit goes with its quantity": (row["ConsumedUnit"] is None) == (row["ConsumedQuantity"] is None),
        "a SKU has a SKU price": (row["SkuId"] is None) == (row["SkuPriceId"] is None),
    }
    return [rule for rule, holds in rules.items() if not holds]


DETAIL = ChargeDetail(
    day=date(2026, 2, 28),
    project_id="proj_default",
    project_name="default",
    batch_id="batch_1",
    model="smollm2-135m",
    price_version=3,
    kind=LedgerKind.CHARGE,
    charged_on=date(2026, 2, 28),
    meter=Meter.OUTPUT,
    rate=60_000_000,
    quantity=1234,
    amount=1234 * 60_000_000,
    tags={"team": "search", "=cmd": "=1+1"},
)

details = st.builds(
    lambda day, earlier, meter, rate, quantity, reversal, tags: ChargeDetail(
        day=day,
        project_id="proj",
        project_name="p",
        batch_id="b",
        model="m",
        price_version=1,
        kind=LedgerKind.REVERSAL if reversal else LedgerKind.CHARGE,
        charged_on=day - timedelta(days=earlier if reversal else 0),
        meter=meter,
        rate=rate,
        quantity=-quantity if reversal else quantity,
        amount=-quantity * rate if reversal else quantity * rate,
        tags=tags,
    ),
    st.dates(date(2000, 1, 1), date(2100, 1, 1)),
    st.integers(0, 400),
    st.sampled_from(Meter),
    st.integers(0, 10**15),
    st.integers(0, 10**12),
    st.booleans(),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)


def test_all_mandatory_columns_are_there() -> None:
    names = [column.name for column in COLUMNS]
    assert len(MANDATORY) == 21
    assert {column.name for column in COLUMNS if column.feature == "mandatory"} == MANDATORY
    assert len(set(names)) == len(names)
    assert {column.name: column.nullable for column in COLUMNS if column.name in RULES} == {n: r.nullable for n, r in RULES.items()}


@given(details)
def test_every_row_follows_the_rules(detail: ChargeDetail) -> None:
    assert problems(focus_row(detail)) == []


def test_the_rules_can_fail() -> None:
    row = focus_row(DETAIL)
    wrong = {"BilledCost": 0.1, "ChargeCategory": "usage", "ListCost": Decimal(1), "ServiceName": None, "ResourceTypo": "x"}
    assert len(problems({**row, **wrong})) == len(wrong)


@given(details)
def test_amounts_are_exact(detail: ChargeDetail) -> None:
    row = focus_row(detail)
    assert row["BilledCost"] * 10**15 == detail.amount


def test_a_reversal_of_an_earlier_month_is_a_correction() -> None:
    taken_back = replace(DETAIL, kind=LedgerKind.REVERSAL, quantity=-DETAIL.quantity, amount=-DETAIL.amount)
    assert focus_row(taken_back)["ChargeClass"] is None
    later = focus_row(replace(taken_back, day=date(2026, 3, 1)))
    assert later["ChargeClass"] == "Correction"
    assert later["BilledCost"] == Decimal("-0.00007404")
    assert later["BillingPeriodStart"] == datetime(2026, 3, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("units", "places", "text"),
    [(0, 15, "0"), (10**15, 15, "1"), (-15 * 10**14, 15, "-1.5"), (1, 15, "0.000000000000001"), (10**20, 6, "1" + "0" * 14)],
)
def test_exact_decimals(units: int, places: int, text: str) -> None:
    assert f"{exact(units, places):f}" == text


def test_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "bill.csv"
    evil = replace(DETAIL, project_name="=HYPERLINK(1)", amount=-DETAIL.amount, quantity=-DETAIL.quantity)
    assert write_focus(iter([focus_row(DETAIL), focus_row(evil)]), path) == 2
    with path.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [column.name for column in COLUMNS]
    assert (first["BilledCost"], first["PricingQuantity"], first["ListUnitPrice"]) == ("0.00007404", "0.001234", "0.06")
    assert (first["ChargeClass"], first["ChargePeriodEnd"]) == ("", "2026-03-01T00:00:00Z")
    assert json.loads(first["Tags"]) == DETAIL.tags
    assert second["BillingAccountName"] == "'=HYPERLINK(1)"
    assert second["BilledCost"] == "-0.00007404"


def test_parquet_file(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is missing: pip install 'longdraft[parquet]'")
    path = tmp_path / "bill.parquet"
    assert write_focus(iter([focus_row(DETAIL)] * 3), path) == 3
    table = pq.read_table(path)
    assert table.column_names == [column.name for column in COLUMNS]
    row = table.to_pylist()[0]
    assert row["BilledCost"] == Decimal("0.00007404")
    assert row["BillingPeriodEnd"] == datetime(2026, 3, 1, tzinfo=UTC)
    assert problems({**row, "Tags": json.loads(row["Tags"])}) == []


def test_an_empty_export_has_a_header(tmp_path: Path) -> None:
    assert write_focus(iter(()), tmp_path / "bill.csv") == 0
    assert (tmp_path / "bill.csv").read_text().count("\n") == 1


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="parquet"):
        write_focus(iter(()), tmp_path / "bill.xls")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def rows() -> Any:
        yield focus_row(DETAIL)
        raise RuntimeError("the database went away")

    with pytest.raises(RuntimeError):
        write_focus(rows(), tmp_path / "bill.csv")
    assert list(tmp_path.iterdir()) == []
