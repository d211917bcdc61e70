"""What the operator reads: prices, both views of cost, exports; three projects over several days, through the command line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli.main import app
from service.domain.usage import Usage, Work
from service.errors import Conflict, InvalidRequest, LongdraftError, NotFound
from service.ports import WorkerRow
from tests.integration.seed import Seed

FIRST = datetime(2026, 3, 1, tzinfo=UTC)
PERIOD = ("--from", "2026-03-01", "--to", "2026-03-04")
SECOND = 10**9

Cli = Callable[..., Result]


@pytest.fixture
def cli(database_url: str, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command against this test's database; an expected error is raised, not printed."""
    monkeypatch.chdir(tmp_path)
    settings = {"DATABASE_URL": database_url, "BROKER_URL": broker_url, "DATA_DIR": str(tmp_path), "RATES__CPU": "0.36"}
    for name, value in settings.items():
        monkeypatch.setenv(f"LONGDRAFT_{name}", value)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, LongdraftError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


def add_worker(database: Any, name: str, device: str) -> None:
    with database.begin() as uow:
        uow.workers.register(name, host="here", pid=1, device=device)
        row = uow.workers.get(name)
        assert row is not None
        uow.workers.beat(WorkerRow(name, "here", 1, device, row.started_at, row.seen_at, None, busy_ns=9 * SECOND, load_ns=SECOND))


@pytest.fixture
def seed(database: Any, owner_url: str) -> Seed:
    """Charges of three projects from 1 to 4 March, the work of `search` done by a CPU, that of `ads` by a device without a rate."""
    seed = Seed(database, owner_url)
    add_worker(database, "w1", "cpu")
    add_worker(database, "w2", "cuda (Unpriced 9000)")
    work = Work(prompt=100, prefilled=60, cached=40, generated=10, sampled=12, drafted=20, verified=8, accepted=6, steps=6)
    timed = work + Work(prefill_ns=SECOND, draft_ns=SECOND // 10, decode_ns=SECOND, plain_ns=3 * SECOND, modelled_ns=SECOND * 11 // 10)
    for day in range(4):
        at = FIRST + timedelta(days=day, hours=12)
        seed.deliver("search", [Usage(100, 40, 10)] * 2, works=[timed] * 2, worker="w1", metadata={"team": "=evil()"}, at=at)
        if day < 2:
            seed.deliver("ads", [Usage(1000, 0, 7)], works=[timed], worker="w2", model="gemma3-270m", at=at)
    seed.deliver("idle", [Usage(1, 0, 1)], at=FIRST + timedelta(days=60))
    return seed


SEARCH_LINE = Decimal(60 * 20 + 40 * 10 + 10 * 60).scaleb(-9)
ADS_LINE = Decimal(1000 * 20 + 7 * 60).scaleb(-9)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return list(json.loads(result.stdout)["rows"])


def test_both_views_by_project(cli: Cli, seed: Seed) -> None:
    report = json.loads(cli("cost", *PERIOD, "--by", "project", "--json").stdout)
    rows = {row["project"]: row for row in report["rows"]}
    search, ads = rows[seed.project("search").id], rows[seed.project("ads").id]
    assert Decimal(search["price"]) == 8 * SEARCH_LINE
    # 2.1 device seconds a line at $0.36 an hour
    assert Decimal(search["cost"]) == 8 * Decimal("2.1") * Decimal("0.0001")
    assert Decimal(search["margin"]) == Decimal(search["price"]) - Decimal(search["cost"])
    assert search["device_seconds"] == pytest.approx(8 * 2.1)
    assert (search["drafted"], search["verified"], search["accepted"], search["wasted"]) == (160, 64, 48, 8 * (14 + 2))
    assert search["saved_seconds_estimate"] == pytest.approx(8 * 1.9)
    assert search["estimate_error"] == pytest.approx(0.1)
    assert Decimal(ads["price"]) == 2 * ADS_LINE
    assert ads["cost"] is ads["margin"] is None, "a device without an hourly rate has no cost, and not a cost of nothing"
    assert Decimal(report["total"]["price"]) == 8 * SEARCH_LINE + 2 * ADS_LINE
    assert report["total"]["cost"] is None
    assert seed.project("idle").id not in rows


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("day", {("2026-03-01",): 3, ("2026-03-02",): 3, ("2026-03-03",): 2, ("2026-03-04",): 2}),
        ("model", {("smollm2-135m",): 8, ("gemma3-270m",): 2}),
        ("tag:team", {("=evil()",): 8, ("",): 2}),
        (
            "day,model",
            {(f"2026-03-0{d}", m): n for d in (1, 2, 3, 4) for m, n in (("smollm2-135m", 2), ("gemma3-270m", 1)) if d < 3 or n == 2},
        ),
    ],
)
def test_groups(cli: Cli, seed: Seed, by: str, groups: dict[tuple[str, ...], int]) -> None:
    found = rows_of(cli("cost", *PERIOD, "--by", by, "--json"))
    assert {tuple(row[key] for key in by.split(",")): row["lines"] for row in found} == groups
    prices = {tuple(row[key] for key in by.split(",")): Decimal(row["price"]) for row in found}
    assert sum(prices.values()) == 8 * SEARCH_LINE + 2 * ADS_LINE


def test_by_batch_for_one_project(cli: Cli, seed: Seed) -> None:
    found = rows_of(cli("cost", *PERIOD, "--by", "batch", "--project", "ads", "--json"))
    assert [row["lines"] for row in found] == [1, 1]


def test_csv_is_safe_to_open(cli: Cli, seed: Seed) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("cost", *PERIOD, "--by", "tag:team", "--csv").stdout)))
    teams = {row["tag:team"]: row for row in rows}
    assert set(teams) == {"'=evil()", ""}
    assert Decimal(teams["'=evil()"]["price"]) == 8 * SEARCH_LINE
    assert teams["'=evil()"]["margin"].startswith("-0.00"), "a negative number is a number"


def test_tables_and_text_charts(cli: Cli, seed: Seed) -> None:
    table = cli("cost", *PERIOD, "--by", "model").stdout
    assert "smollm2-135m" in table
    assert "total" in table
    chart = cli("cost", *PERIOD, "--by", "model", "--plot", "terminal").stdout
    assert "█" in chart
    assert "Nothing was delivered" in cli("cost", "--from", "2020-01-01", "--to", "2020-01-02").stdout


def test_chart_file(cli: Cli, seed: Seed, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'longdraft[plot]'")
    cli("cost", *PERIOD, "--by", "day", "--plot", tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidRequest, match="ends in"):
        cli("cost", *PERIOD, "--plot", tmp_path / "cost.xyz")


def test_focus_equals_the_ledger(cli: Cli, seed: Seed, tmp_path: Path) -> None:
    path = tmp_path / "bill.csv"
    cli("cost", *PERIOD, "--focus", path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(Decimal(row["BilledCost"]) for row in rows) == 8 * SEARCH_LINE + 2 * ADS_LINE
    assert {row["BillingAccountName"] for row in rows} == {"search", "ads"}
    assert {row["ChargePeriodStart"] for row in rows} == {f"2026-03-0{day}T00:00:00Z" for day in (1, 2, 3, 4)}
    assert len(rows) == 4 * 3 + 2 * 2  # days x meters that counted something
    assert {row["Tags"] for row in rows} == {'{"team":"=evil()"}', "{}"}


def test_reversals_show_up_everywhere(cli: Cli, seed: Seed, tmp_path: Path) -> None:
    batch = rows_of(cli("cost", *PERIOD, "--by", "batch", "--project", "ads", "--json"))[0]["batch"]
    taken_back = json.loads(cli("ledger", "reverse", batch, "1", "--json").stdout)
    assert Decimal(taken_back["amount"]) == -ADS_LINE
    with pytest.raises(Conflict, match=f"^The charge of line 1 of {batch} was taken back before.$"):
        cli("ledger", "reverse", batch, "1")
    with pytest.raises(NotFound):
        cli("ledger", "reverse", batch, "2")
    today = datetime.now(UTC).date().isoformat()
    everything = json.loads(cli("cost", "--from", "2026-03-01", "--to", today, "--by", "batch", "--json", "--project", "ads").stdout)
    assert {row["batch"]: Decimal(row["price"]) for row in everything["rows"]}[batch] == 0
    path = tmp_path / "bill.csv"
    cli("cost", "--from", today, "--focus", path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["ChargeClass"] for row in rows if Decimal(row["BilledCost"]) < 0} == {"Correction"}
    assert sum(Decimal(row["BilledCost"]) for row in rows) == -ADS_LINE
    other = rows_of(cli("cost", *PERIOD, "--by", "batch", "--project", "search", "--json"))[0]["batch"]
    assert cli("ledger", "reverse", other, "1").stdout.startswith("-$0.")


def test_workers(cli: Cli, seed: Seed) -> None:
    seed.deliver("search", [Usage(1, 0, 1)] * 2, works=[Work(prefill_ns=SECOND, decode_ns=3 * SECOND)] * 2, worker="w1")
    rows = {row["worker"]: row for row in rows_of(cli("cost", "--workers", "--json"))}
    assert (rows["w1"]["attributed_seconds"], rows["w1"]["lost_seconds"], rows["w1"]["load_seconds"]) == (8, 1, 1)
    assert rows["w1"]["cost"] is not None
    assert rows["w2"]["cost"] is None
    assert "w1" in cli("cost", "--workers").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--from", "yesterday"), "2026-03-31"),
        (("--from", "2026-03-02", "--to", "2026-03-01"), "lies after"),
        (("--by", "customer"), "grouped by"),
        (("--project", "nobody"), "nobody"),
        (("--focus", "bill.xls"), "parquet"),
    ],
)
def test_bad_questions(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(LongdraftError, match=says):
        cli("cost", *arguments)


# --- prices -------------------------------------------------------------------------------------------------------------------


def shown(cli: Cli, *arguments: str) -> dict[str, Any]:
    return dict(json.loads(cli("prices", *arguments, "--json").stdout))


def test_prices_are_versions(cli: Cli, database: Any, owner_url: str) -> None:
    first = shown(cli, "show")
    assert first["dollars_per_million"]["*"] == {"input": "0.02", "cached_input": "0.01", "output": "0.06"}
    second = shown(cli, "set", "gemma3-270m", "--input", "0.03", "--cached", "0.015", "--output", "0.090000001")
    assert second["version"] == first["version"] + 1
    assert second["dollars_per_million"]["gemma3-270m"] == {"input": "0.03", "cached_input": "0.015", "output": "0.090000001"}
    third = shown(cli, "set", "*", "--discount", "50%")
    assert third["dollars_per_million"]["*"] == {"input": "0.01", "cached_input": "0.005", "output": "0.03"}
    assert third["dollars_per_million"]["gemma3-270m"] == second["dollars_per_million"]["gemma3-270m"]
    assert [book["version"] for book in json.loads(cli("prices", "history", "--json").stdout)] == [1, 2, 3]
    assert shown(cli, "show", "--version", "1") == first
    assert "0.090000001" in cli("prices", "history").stdout
    batch = Seed(database, owner_url).deliver("p", [Usage(10, 0, 10)], model="unpriced")
    with database.begin() as uow:
        assert uow.ledger.batch_total(batch).total == 10 * 10_000_000 + 10 * 30_000_000


def test_a_batch_keeps_the_prices_it_was_created_under(cli: Cli, database: Any, tmp_path: Path) -> None:
    from service.adapters.memory import MemoryBlobStore
    from tests.integration.jobs import Jobs, lines, settings_for

    jobs = Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path))
    before = jobs.run(lines(3))
    cli("prices", "set", "smollm2-135m", "--input", "9", "--output", "9")
    jobs.drain()
    with database.begin() as uow:
        (old,) = {detail.rate for detail in uow.costs.details(_everything(uow, before.id)) if detail.meter == "input"}
    assert old == 20_000_000


def _everything(uow: Any, batch_id: str) -> Any:
    from service.ports import ChargeFilter

    return ChargeFilter(FIRST, uow.now + timedelta(seconds=1), batch_ids=[batch_id])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("smollm2-135m",), "Nothing to change"),
        (("unknown", "--input", "1"), "No model"),
        (("smollm2-135m", "--input", "0.0000000001"), "9 decimal places"),
        (("smollm2-135m", "--input", "-1"), "decimal number"),
        (("smollm2-135m", "--input", "1e3"), "decimal number"),
        (("smollm2-135m", "--discount", "101%"), "0% to 100%"),
        (("smollm2-135m", "--input", "0.000000001", "--discount", "50%"), "whole number"),
    ],
)
def test_prices_that_are_refused(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        cli("prices", "set", *arguments)
    assert shown(cli, "show")["version"] == 1
