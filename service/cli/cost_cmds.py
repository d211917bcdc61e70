"""Commands about money: what batches cost, prices, taking a charge back. Reports over time are the operator's: they read the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.connect import connect, open_deployment
from service.cli.output import AsJson, Failure, note, print_json, print_table

if TYPE_CHECKING:
    from service.domain.money import PriceBook, Rates

DEFAULT_DAYS = 30


def register(app: typer.Typer) -> None:
    app.command()(cost)
    prices = typer.Typer(help="Prices: set, show, history.", no_args_is_help=True)
    prices.command("set")(prices_set)
    prices.command("show")(prices_show)
    prices.command("history")(prices_history)
    app.add_typer(prices, name="prices")
    ledger = typer.Typer(help="The ledger: take a charge back.", no_args_is_help=True)
    ledger.command("reverse")(ledger_reverse)
    app.add_typer(ledger, name="ledger")


def cost(
    batch_id: Annotated[str | None, typer.Argument(metavar="[BATCH]", help="One batch in detail; without it, the newest ones.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many batches to sum up.")] = 20,
    since: Annotated[str | None, typer.Option("--from", metavar="DAY", help="Report from this day on (YYYY-MM-DD, UTC).")] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="DAY", help="The last day of the report (default: today).")] = None,
    by: Annotated[str | None, typer.Option("--by", help="day, model, project, batch, api_key, tag:<key>; several with commas.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="Id or name; default: all projects.")] = None,
    workers: Annotated[bool, typer.Option("--workers", help="Where workers' time went, what it cost, and how starts were spent.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE", help="A chart: .png, .svg or .pdf, or `terminal`.")] = None,
    focus: Annotated[Path | None, typer.Option("--focus", metavar="FILE", help="FOCUS 1.2 export: .csv or .parquet.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a batch cost, what the newest batches cost, or, with any of --from --to --by --workers --focus, a report.

    Reports have both views: what was charged (price) and what the device time behind it cost at the hourly [rates] of the settings.
    """
    options = {"--from": since, "--to": until, "--by": by, "--project": project, "--workers": workers, "--focus": focus}
    formats = {"--csv": as_csv, "--plot": plot}
    check_together({"BATCH": batch_id, **options, **formats, "--json": as_json})
    if any([*options.values(), *formats.values()]):
        start, end = period(since, until)
        keys = [key.strip() for key in (by or "day").split(",") if key.strip()]
        _report(start, end, keys, project, workers=workers, as_csv=as_csv, plot=plot, focus=focus, as_json=as_json)
        return
    from service.cli import bill

    with connect() as server:
        if batch_id is None:
            bill.print_summary(list(server.batches(limit)), as_json=as_json)
        else:
            report = server.get(f"/batches/{batch_id}/cost")
            print_json(report) if as_json else bill.print_report(report)


APART: Mapping[str, Sequence[str]] = {
    "BATCH": ("--from", "--to", "--by", "--project", "--workers", "--focus", "--csv", "--plot"),
    "--focus": ("--by", "--workers", "--csv", "--plot"),
    "--workers": ("--by", "--project", "--plot"),
    "--plot": ("--csv", "--json"),
    "--csv": ("--json",),
}
"""What has no meaning together."""


def check_together(given: Mapping[str, object]) -> None:
    """Nothing that was asked for is left out in silence. Raises BadParameter for the first two options that exclude each other."""
    for option, others in APART.items():
        for other in others:
            if given[option] and given[other]:
                raise typer.BadParameter(f"{option} and {other} do not go together; leave one of them out.")


def period(since: str | None, until: str | None) -> tuple[datetime, datetime]:
    """[start, end) of a report in UTC: whole days, the last one included; thirty days up to today where nothing is said."""
    last = _day(until, "--to") if until else datetime.now(UTC).date()
    first = _day(since, "--from") if since else last - timedelta(days=DEFAULT_DAYS - 1)
    if first > last:
        raise Failure(f"--from {first} lies after --to {last}.")
    midnight = datetime.min.time()
    return datetime.combine(first, midnight, UTC), datetime.combine(last + timedelta(days=1), midnight, UTC)


def _day(text: str, option: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise Failure(f"{option} takes a day such as 2026-03-31, got {text!r}.") from None


def _report(
    start: datetime,
    end: datetime,
    by: Sequence[str],
    project: str | None,
    *,
    workers: bool,
    as_csv: bool,
    plot: str | None,
    focus: Path | None,
    as_json: bool,
) -> None:
    from service.billing.operator import HourlyRates, total
    from service.billing.report_rows import cost_row, start_row, worker_row
    from service.cli import cost_view
    from service.usecases.cost_report import cost_report, load_report, worker_report

    with open_deployment() as services:
        rates = HourlyRates.parse(services.settings.rates)
        if focus is not None:
            _export(services.database, start, end, project, focus, as_json=as_json)
            return
        starts = []
        if workers:
            rows = [worker_row(line) for line in worker_report(services.database, start, end, rates)]
            starts = [
                start_row(row.load.worker_id, row.load.model, row.load.batch_id, row.load.profile_reused, row.load.error, parts)
                for row, parts in load_report(services.database, start, end)
            ]
        else:
            lines = cost_report(services.database, start=start, end=end, by=by, rates=rates, project=project)
            rows = [cost_row(line, by) for line in lines]
    if plot is not None:
        cost_view.plot(lines, by, plot)
        if plot != cost_view.TERMINAL:
            note(f"chart: {plot}")
        return
    if as_csv:
        cost_view.write_csv(rows, () if workers else by)
    elif as_json:
        summary = None if workers else cost_row(total(lines), ())
        print_json({"from": start, "to": end, "rows": rows, **({"starts": starts} if workers else {"total": summary})})
    else:
        cost_view.show(rows, [] if workers else [cost_row(total(lines), ())], () if workers else by)
        cost_view.show_starts(starts)


def _export(database: Any, start: datetime, end: datetime, project: str | None, path: Path, *, as_json: bool) -> None:
    from service.adapters.focus_files import write_focus
    from service.billing.focus import focus_row
    from service.ports import ChargeFilter
    from service.usecases.keys import find_project

    with database.begin() as uow:
        projects = [find_project(uow, project).id] if project else None
        count = write_focus((focus_row(detail) for detail in uow.costs.details(ChargeFilter(start, end, projects))), path)
    print_json({"file": path, "rows": count}) if as_json else note(f"{count} rows: {path}")


# --- prices -------------------------------------------------------------------------------------------------------------------


def prices_set(
    model: Annotated[str, typer.Argument(help="A registered model, or '*' for all that have no price of their own.")],
    input_price: Annotated[str | None, typer.Option("--input", metavar="DOLLARS", help="Per million input tokens.")] = None,
    cached: Annotated[str | None, typer.Option("--cached", metavar="DOLLARS", help="Per million input tokens found in the cache.")] = None,
    output_price: Annotated[str | None, typer.Option("--output", metavar="DOLLARS", help="Per million output tokens.")] = None,
    discount: Annotated[str | None, typer.Option("--discount", metavar="PERCENT", help="Taken off all three, e.g. 50%.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set what new batches pay for a model. Batches that exist keep the prices they were created under."""
    from service.usecases.prices import PriceChange, set_prices

    change = PriceChange(model, input_price, cached, output_price, discount)
    with open_deployment() as services:
        book = set_prices(change, database=services.database, known_models=list(services.settings.models))
    _print_book(book, as_json=as_json)


def prices_show(
    version: Annotated[int | None, typer.Option(min=1, help="An earlier version.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the prices that new batches pay."""
    with open_deployment() as services, services.database.begin() as uow:
        book = uow.ledger.price_book(version)
    _print_book(book, as_json=as_json)


def prices_history(as_json: AsJson = False) -> None:
    """List all versions of the prices; each is kept for good."""
    with open_deployment() as services, services.database.begin() as uow:
        books = uow.ledger.price_history()
    if as_json:
        print_json([_book(book) for book in books])
        return
    rows = [(book.version, book.created_at, *cells) for book in books for cells in _cells(book)]
    print_table(("version", "since", "model", "input", "cached", "output"), rows, right=("input", "cached", "output"))


def ledger_reverse(
    batch_id: Annotated[str, typer.Argument(metavar="BATCH", help="A batch id (batch_...).")],
    line_no: Annotated[int, typer.Argument(metavar="LINE", min=1, help="The line's number in the input.")],
    as_json: AsJson = False,
) -> None:
    """Take the charge of a line back. The ledger keeps both the charge and its reversal."""
    from service.billing.ledger import debited
    from service.billing.price_book import exact_dollars
    from service.cli.bill import dollars
    from service.usecases.corrections import reverse_charge

    with open_deployment() as services:
        posted = reverse_charge(services.database, batch_id, line_no)
    amount = exact_dollars(debited(posted))
    print_json({"batch_id": batch_id, "line": line_no, "amount": amount}) if as_json else print(dollars(amount))


def _print_book(book: PriceBook, *, as_json: bool) -> None:
    if as_json:
        print_json(_book(book))
        return
    note(f"Version {book.version}, since {book.created_at:%Y-%m-%d %H:%M:%S} UTC; dollars per million tokens.")
    print_table(("model", "input", "cached", "output"), _cells(book), right=("input", "cached", "output"))


def _book(book: PriceBook) -> dict[str, Any]:
    models = {model: {"input": i, "cached_input": c, "output": o} for model, i, c, o in _cells(book)}
    return {"version": book.version, "created_at": book.created_at, "dollars_per_million": models}


def _cells(book: PriceBook) -> list[tuple[str, str, str, str]]:
    from service.billing.price_book import format_rate

    entries: dict[str, Rates] = {**dict(sorted(book.models.items())), "*": book.default}
    return [(model, format_rate(r.input), format_rate(r.cached_input), format_rate(r.output)) for model, r in entries.items()]
