"""The cost report of a batch on the wire (shaped by billing.reports)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class CostLines(BaseModel):
    """Lines of the batch; `billed` are the delivered ones, less those whose charge was taken back."""

    total: int
    billed: int
    completed: int
    failed: int


class MeterObject(BaseModel):
    """Tokens of one kind and model at one rate. Dollars are exact decimal strings."""

    model: str
    meter: Literal["input", "cached_input", "output"]
    quantity: int
    dollars_per_million: str
    amount: str


class SpeculationObject(BaseModel):
    """Tokens: drafted = pruned + verified, verified = accepted + rejected."""

    drafted: int
    verified: int
    accepted: int
    rejected: int
    pruned: int
    acceptance_length: float | None = Field(description="Tokens per target forward pass; 1 is plain decoding.")
    acceptance_rate: float | None


class DeviceSeconds(BaseModel):
    """Device time of the delivered lines."""

    prefill: float
    draft: float
    decode: float
    total: float


class BatchCostObject(BaseModel):
    """What a batch is charged, and the work behind it."""

    object: Literal["batch.cost"]
    batch_id: str
    status: str
    model: str | None
    currency: Literal["usd"]
    amount: str = Field(description="Dollars, exact, as a decimal string.")
    final: bool
    price_version: int
    lines: CostLines
    meters: list[MeterObject]
    speculation: SpeculationObject
    device_seconds: DeviceSeconds
