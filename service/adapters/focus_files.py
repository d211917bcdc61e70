"""FOCUS rows as files: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from service.billing.focus import COLUMNS, Kind
from service.billing.tables import formula_safe
from service.errors import ConfigError, InvalidRequest

ROWS_AT_ONCE = 10_000


def write_focus(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes rows of billing.focus to `path`; its ending (.csv or .parquet) names the format. Returns how many there were.

    The file appears whole or not at all.

    Raises:
        InvalidRequest: another ending, or a folder that cannot be written to.
        ConfigError: Parquet without pyarrow.
    """
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise InvalidRequest(f"FOCUS files end in {' or '.join(_WRITERS)}; got {path.name!r}.", param="path")
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            count = writer(rows, file)
        partial.replace(path)
    except OSError as error:
        raise InvalidRequest(f"Cannot write {path}: {error.strerror or error}.", param="path") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def write_csv(rows: Iterable[Mapping[str, Any]], file: BinaryIO) -> int:
    """Nulls are empty, times in UTC with a Z, tags a JSON object."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    out = csv.writer(text)
    out.writerow([column.name for column in COLUMNS])
    count = 0
    for row in rows:
        out.writerow([_cell(row[column.name]) for column in COLUMNS])
        count += 1
    text.detach()
    return count


def write_parquet(rows: Iterable[Mapping[str, Any]], file: BinaryIO) -> int:
    """Decimals as decimal(38, 15), times as UTC microseconds, tags as a JSON string."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow, which is not installed: pip install 'longdraft[parquet]', or write .csv.") from None
    types = {Kind.STRING: pa.string(), Kind.KEY_VALUE: pa.string(), Kind.DECIMAL: pa.decimal128(38, 15)}
    types[Kind.DATETIME] = pa.timestamp("us", tz="UTC")
    schema = pa.schema([pa.field(column.name, types[column.kind], nullable=column.nullable) for column in COLUMNS])
    count, rest = 0, iter(rows)
    with pq.ParquetWriter(file, schema) as writer:
        while chunk := [{**row, "Tags": _json(row["Tags"])} for row in islice(rest, ROWS_AT_ONCE)]:
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
            count += len(chunk)
    return count


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, Mapping):
        return _json(value)
    return formula_safe(str(value))


def _json(tags: Mapping[str, str]) -> str:
    return orjson.dumps(dict(tags), option=orjson.OPT_SORT_KEYS).decode()


_WRITERS: Mapping[str, Callable[[Iterable[Mapping[str, Any]], BinaryIO], int]] = {".csv": write_csv, ".parquet": write_parquet}
