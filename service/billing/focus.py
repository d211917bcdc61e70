"""The bill as FOCUS 1.2 rows: the FinOps Open Cost and Usage Specification, which finance tools read.

One row a day, batch, model, meter and price. All mandatory columns, the conditional ones that apply to metered tokens, and columns of our
own with the prefix `x_`. Amounts and quantities are exact decimals; nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from service.domain.money import ChargeDetail, LedgerKind, Meter

Value = str | Decimal | datetime | None

ISSUER = "Longdraft"
CURRENCY = "USD"
UNIT = "Tokens"
PRICING_TOKENS = 1_000_000
PRICING_UNIT = f"{PRICING_TOKENS} {UNIT}"


class Kind(StrEnum):
    """Data types of the specification; a decimal has at most 15 places here (the ledger's unit)."""

    STRING = "string"
    DECIMAL = "decimal"
    DATETIME = "datetime"
    KEY_VALUE = "key-value"
    """A JSON object of strings."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the export; `feature` says whether the specification makes it mandatory, conditional, recommended, or it is ours."""

    name: str
    kind: Kind = Kind.STRING
    nullable: bool = False
    feature: str = "mandatory"


_DECIMAL, _DATETIME = Kind.DECIMAL, Kind.DATETIME
COLUMNS: Sequence[Column] = (
    Column("BilledCost", _DECIMAL),
    Column("BillingAccountId"),
    Column("BillingAccountName", nullable=True),
    Column("BillingCurrency"),
    Column("BillingPeriodEnd", _DATETIME),
    Column("BillingPeriodStart", _DATETIME),
    Column("ChargeCategory"),
    Column("ChargeClass", nullable=True),
    Column("ChargeDescription", nullable=True),
    Column("ChargeFrequency", feature="recommended"),
    Column("ChargePeriodEnd", _DATETIME),
    Column("ChargePeriodStart", _DATETIME),
    Column("ConsumedQuantity", _DECIMAL, nullable=True, feature="conditional"),
    Column("ConsumedUnit", nullable=True, feature="conditional"),
    Column("ContractedCost", _DECIMAL),
    Column("ContractedUnitPrice", _DECIMAL, nullable=True, feature="conditional"),
    Column("EffectiveCost", _DECIMAL),
    Column("InvoiceIssuerName"),
    Column("ListCost", _DECIMAL),
    Column("ListUnitPrice", _DECIMAL, nullable=True, feature="conditional"),
    Column("PricingCategory", nullable=True, feature="conditional"),
    Column("PricingQuantity", _DECIMAL, nullable=True),
    Column("PricingUnit", nullable=True),
    Column("ProviderName"),
    Column("PublisherName"),
    Column("ResourceId", nullable=True, feature="conditional"),
    Column("ResourceType", nullable=True, feature="conditional"),
    Column("ServiceCategory"),
    Column("ServiceName"),
    Column("ServiceSubcategory", feature="recommended"),
    Column("SkuId", nullable=True, feature="conditional"),
    Column("SkuMeter", nullable=True, feature="conditional"),
    Column("SkuPriceId", nullable=True, feature="conditional"),
    Column("Tags", Kind.KEY_VALUE, nullable=True, feature="conditional"),
    Column("x_Model", feature="custom"),
    Column("x_PriceVersion", feature="custom"),
)

_SKU_METER: Mapping[Meter, str] = {
    Meter.INPUT: "Input Tokens",
    Meter.CACHED_INPUT: "Cached Input Tokens",
    Meter.OUTPUT: "Output Tokens",
}


def focus_row(detail: ChargeDetail) -> dict[str, Value | Mapping[str, str]]:
    """The columns of one row, in the order of `COLUMNS`.

    Prices are published as they are billed: list, contracted and effective cost are the billed cost. A reversal of an earlier month's
    charge is a Correction; within a month it is a negative usage row, as the specification has it.
    """
    cost = exact(detail.amount, 15)
    unit_price = exact(detail.rate, 9)
    corrects_closed_month = detail.kind is LedgerKind.REVERSAL and _month(detail.charged_on) != _month(detail.day)
    meter = _SKU_METER[detail.meter]
    values: dict[str, Value | Mapping[str, str]] = {
        "BilledCost": cost,
        "BillingAccountId": detail.project_id,
        "BillingAccountName": detail.project_name,
        "BillingCurrency": CURRENCY,
        "BillingPeriodStart": _midnight(_month(detail.day)),
        "BillingPeriodEnd": _midnight(_month(_month(detail.day) + timedelta(days=31))),
        "ChargeCategory": "Usage",
        "ChargeClass": "Correction" if corrects_closed_month else None,
        "ChargeDescription": f"{meter} of {detail.model}, batch {detail.batch_id}"
        + (", reversed" if detail.kind is LedgerKind.REVERSAL else ""),
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": _midnight(detail.day),
        "ChargePeriodEnd": _midnight(detail.day + timedelta(days=1)),
        "ConsumedQuantity": Decimal(detail.quantity),
        "ConsumedUnit": UNIT,
        "ContractedCost": cost,
        "ContractedUnitPrice": unit_price,
        "EffectiveCost": cost,
        "InvoiceIssuerName": ISSUER,
        "ListCost": cost,
        "ListUnitPrice": unit_price,
        "PricingCategory": "Standard",
        "PricingQuantity": exact(detail.quantity, 6),
        "PricingUnit": PRICING_UNIT,
        "ProviderName": ISSUER,
        "PublisherName": ISSUER,
        "ResourceId": detail.batch_id,
        "ResourceType": "Batch",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Batch Inference",
        "ServiceSubcategory": "Generative AI",
        "SkuId": f"{detail.model}/{detail.meter.value}",
        "SkuMeter": meter,
        "SkuPriceId": f"{detail.model}/{detail.meter.value}/{detail.price_version}",
        "Tags": detail.tags,
        "x_Model": detail.model,
        "x_PriceVersion": str(detail.price_version),
    }
    return {column.name: values[column.name] for column in COLUMNS}


def exact(units: int, places: int) -> Decimal:
    """`units` x 10^-places without trailing zeros or an exponent that a spreadsheet could misread; exact at any size."""
    sign, digits = int(units < 0), str(abs(units)).rstrip("0") or "0"
    exponent = len(str(abs(units))) - len(digits) - places if units else 0
    if exponent > 0:
        digits, exponent = digits + "0" * exponent, 0
    return Decimal((sign, tuple(map(int, digits)), exponent))


def _month(day: date) -> date:
    return day.replace(day=1)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
