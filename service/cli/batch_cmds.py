"""Commands on batches: submit, watch, results, cancel, retry, list. They speak to the server over HTTP."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.connect import connect
from service.cli.output import AsJson, Failure, note, print_json, print_table

if TYPE_CHECKING:
    from service.cli.client import Server

CHAT = "/v1/chat/completions"
LONGEST_LINE = 4 << 20
SEARCHED_LINES = 1000
"""How far into a job its endpoint is looked for: a bad first line must not sink the others."""
BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="A batch id (batch_...).")]
Wait = Annotated[bool, typer.Option("--wait", help="Stay until the batch has ended; exit code 1 if a line failed.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Where the answers go; failed lines go to OUT.errors.jsonl.")]


def register(app: typer.Typer) -> None:
    for command in (submit, watch, results, cancel, retry):
        app.command()(command)
    app.command("list")(list_batches)


def submit(
    job: Annotated[str, typer.Argument(metavar="JOB.jsonl", help="Requests, one a line, in OpenAI's batch format; or s3://bucket/key.")],
    wait: Wait = False,
    output: Output = None,
    output_uri: Annotated[
        str | None, typer.Option("--output-uri", metavar="S3-FOLDER", help="Results go there as well: s3://bucket/folder/.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Default: the url of the first line that has one; for s3:// chat completions.")
    ] = None,
    window: Annotated[str, typer.Option(help="The batch expires after this long: 30m, 24h, 7d.")] = "24h",
    priority: Annotated[int, typer.Option(min=0, max=9, help="Higher runs first.")] = 0,
    drafter: Annotated[str, typer.Option(help="auto, off, or a drafter's name.")] = "auto",
    on_invalid_line: Annotated[str, typer.Option(help="fail: one bad line fails the batch. skip: it goes to the error file.")] = "fail",
    metadata: Annotated[list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Repeatable.")] = None,
    max_cost: Annotated[str | None, typer.Option(metavar="DOLLARS", help="End under this; what does not fit is not run.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it would cost; the upload is removed again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a job, or name one in a bucket, and start it."""
    in_bucket = job.startswith("s3://")
    _check_output(output, wait, *(() if in_bucket else (Path(job),)))
    request: dict[str, Any] = {
        "endpoint": endpoint or (CHAT if in_bucket else endpoint_of(Path(job))),
        "completion_window": window,
        "priority": priority,
        "drafter": drafter,
        "on_invalid_line": on_invalid_line,
        "metadata": _pairs(metadata or ()),
        **({"max_cost": max_cost} if max_cost is not None else {}),
        **({"output_uri": output_uri} if output_uri is not None else {}),
        **({"input_uri": job} if in_bucket else {}),
    }
    with connect() as server:
        if not in_bucket:
            request["input_file_id"] = _upload(server, Path(job), quiet=as_json)["id"]
        if estimate:
            _estimate(server, request, as_json=as_json)
            return
        batch = _create(server, request)
        _started(server, batch, wait=wait, output=output, as_json=as_json)


def watch(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Show the progress of a batch until it ends; exit code 1 if a line failed. --json prints a line for every change."""
    from service.cli import progress

    with connect() as server:
        batch = progress.watch(server, batch_id, as_json=as_json)
        _report(batch, quiet=as_json)


def results(
    batch_id: BatchId,
    output: Output = None,
    errors: Annotated[bool, typer.Option("--errors", help="The failed lines instead of the answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the answers of a batch (JSONL, in input order) or save them with -o. While it runs: what is finished so far."""
    if output is not None:
        require_place(output)
    with connect() as server:
        batch = server.get(f"/batches/{batch_id}")
        from service.cli.progress import ENDED

        if batch["status"] not in ENDED:
            if output is not None:
                raise Failure(
                    f"Batch {batch_id} is {batch['status']}; -o is for ended ones. Without it, what is finished so far is printed."
                )
            note(f"Batch {batch_id} is {batch['status']}: these are the results so far.")
            _print_running(server, batch_id, errors=errors)
        elif output is not None:
            saved = save(server, batch, output)
            print_json({"batch": batch_id, **saved}) if as_json else _print_saved(saved)
        else:
            file_id = batch["error_file_id" if errors else "output_file_id"]
            if file_id is None:
                note(f"Batch {batch_id} has no {'failed lines' if errors else 'answers'}.")
                return
            for chunk in server.download(file_id):
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def cancel(batch_id: BatchId, as_json: AsJson = False) -> None:
    """Stop a batch: what is finished is kept and billed, the rest goes to the error file."""
    with connect() as server:
        batch = server.post(f"/batches/{batch_id}/cancel")
    print_json(batch) if as_json else print(f"{batch['id']} is {batch['status']}")


def retry(batch_id: BatchId, wait: Wait = False, output: Output = None, as_json: AsJson = False) -> None:
    """Run the failed lines of an ended batch again, as a new batch."""
    _check_output(output, wait)
    with connect() as server:
        batch = server.post(f"/batches/{batch_id}/retry")
        _started(server, batch, wait=wait, output=output, as_json=as_json)


def list_batches(limit: Annotated[int, typer.Option(min=1, help="At most this many, newest first.")] = 20, as_json: AsJson = False) -> None:
    """List the batches of your project."""
    with connect() as server:
        found = list(server.batches(limit))
    if as_json:
        print_json(found)
        return
    columns = ("batch", "status", "created", "lines", "failed", "model", "cost")
    print_table(columns, (_row(batch) for batch in found), right=("lines", "failed", "cost"))


# --- the steps they share -----------------------------------------------------------------------------------------------------


def endpoint_of(job: Path) -> str:
    """The url of the first line that names one: a batch has one endpoint, and every line must name it. Raises Failure."""
    import orjson

    try:
        with job.open("rb") as file:
            for line in islice(iter(lambda: file.readline(LONGEST_LINE), b""), SEARCHED_LINES):
                with suppress(ValueError, KeyError, TypeError):
                    url = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))["url"]
                    if isinstance(url, str):
                        return url
            empty = file.tell() == 0
    except OSError as error:
        raise Failure(f"Cannot read {job}: {error.strerror or error}.") from None
    found = "it is empty" if empty else f"none of its first {SEARCHED_LINES:,} lines is a JSON object with a url"
    raise Failure(f'{job} is no batch job: {found}. A line is {{"custom_id": ..., "method": "POST", "url": "{CHAT}", "body": ...}}.')


def require_place(output: Path, *kept: Path) -> None:
    """Before anything is started: answers must have somewhere to go, and neither they nor the failed lines may go over a file of `kept`.

    Raises Failure.
    """
    if output.exists() and not output.is_file():
        raise Failure(f"Cannot write {output}: it is {'a folder' if output.is_dir() else 'no regular file'}. Name a file.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise Failure(f"Cannot write {output}: {output.parent.absolute()} is not a folder that can be written to.")
    for written in (output, errors_path(output)):
        for path in kept:
            if written.resolve() == path.resolve():
                raise Failure(f"Cannot write {written}: it would go over {path}. Name another file.")


def errors_path(output: Path) -> Path:
    """OUT.jsonl -> OUT.errors.jsonl, beside it."""
    stem = output.name.removesuffix(".jsonl")
    return output.with_name(f"{stem}.errors.jsonl")


def save(server: Server, batch: Mapping[str, Any], output: Path) -> dict[str, str | None]:
    """Downloads the answers to `output` and the failed lines beside it. A file that would be empty is not written, and where an earlier
    batch left one it does not stay beside the other."""
    saved: dict[str, str | None] = {"output": None, "errors": None}
    file_ids = {"output": batch["output_file_id"], "errors": batch["error_file_id"]}
    for name, path in (("output", output), ("errors", errors_path(output))):
        file_id = file_ids[name]
        if file_id is not None:
            _write(path, server.download(file_id))
            saved[name] = str(path)
        elif any(file_ids.values()):
            path.unlink(missing_ok=True)
    return saved


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    """Whole or not at all: a half download never lies under the final name."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.writelines(chunks)
        partial.replace(path)
    except OSError as error:
        raise Failure(f"Cannot write {path}: {error.strerror or error}.") from None
    finally:
        partial.unlink(missing_ok=True)


def _check_output(output: Path | None, wait: bool, *kept: Path) -> None:
    """`-o` of a command that starts a batch. Raises BadParameter or Failure."""
    if output is None:
        return
    if not wait:
        raise typer.BadParameter("-o needs --wait: there are no answers before the batch has ended.")
    require_place(output, *kept)


def _upload(server: Server, job: Path, *, quiet: bool) -> dict[str, Any]:
    if quiet or not job.exists() or job.stat().st_size < 4 << 20:
        return server.upload(job, lambda _: None)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from service.cli.output import console

    columns = (TextColumn("uploading"), BarColumn(bar_width=28), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=job.stat().st_size)
        return server.upload(job, lambda sent: bar.update(task, completed=sent))


def _create(server: Server, request: Mapping[str, Any]) -> dict[str, Any]:
    """A refused create leaves no upload behind. Where the server did not answer, nobody knows whether there is a batch: the file stays."""
    from service.cli.client import Unreachable

    try:
        return server.post("/batches", request, once=True)
    except Unreachable:
        raise
    except Failure:
        if "input_file_id" in request:
            with suppress(Failure):  # why it was refused is what counts
                server.delete(f"/files/{request['input_file_id']}")
        raise


def _estimate(server: Server, request: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints what the request would cost; exit code 1 if it would fail."""
    from service.cli import bill

    try:
        found = server.post("/batches/estimate", request)
    finally:
        if "input_file_id" in request:
            server.delete(f"/files/{request['input_file_id']}")
    print_json(found) if as_json else bill.print_estimate(found)
    if found["errors"]["data"]:
        raise typer.Exit(1)


def _started(server: Server, batch: dict[str, Any], *, wait: bool, output: Path | None, as_json: bool) -> None:
    if not wait:
        if as_json:
            print_json(batch)
        else:
            print(batch["id"])
            note(f"Follow it with `longdraft watch {batch['id']}`, fetch the answers with `longdraft results {batch['id']}`.")
        return
    from service.cli import progress

    if not as_json:
        note(batch["id"])
        batch = progress.watch(server, batch["id"], as_json=False)
    else:
        *_, batch = progress.states(server, batch["id"])
    saved = save(server, batch, output) if output is not None else {}
    if as_json:
        print_json({**batch, **({"saved": saved} if saved else {})})
    else:
        _print_saved(saved)
    _report(batch, quiet=as_json)


def _report(batch: Mapping[str, Any], *, quiet: bool) -> None:
    """Says how the batch ended; exit code 1 unless every line has an answer."""
    counts = batch["request_counts"]
    if not quiet:
        if batch.get("output_uri") and batch["status"] in ("completed", "expired", "cancelled"):
            note(f"results: {batch['output_uri']}")
        note(f"{batch['id']} {batch['status']}: {counts['completed']} of {counts['total']} lines answered, {counts['failed']} failed")
        for error in (batch.get("errors") or {}).get("data", ())[:10]:
            where = f"line {error['line']}: " if error.get("line") else ""
            note(f"  {where}{error['code']}: {error['message']}")
    if batch["status"] != "completed" or counts["failed"]:
        raise typer.Exit(1)


def _print_saved(saved: Mapping[str, str | None]) -> None:
    for name, path in saved.items():
        if path is not None:
            note(f"{name}: {path}")


def _print_running(server: Server, batch_id: str, *, errors: bool) -> None:
    import orjson

    cursor: Any = None
    while True:
        page = server.get(f"/batches/{batch_id}/results", after=cursor)
        for line in page["data"]:
            failed = line["response"] is None or line["response"]["status_code"] != 200
            if failed == errors:
                sys.stdout.buffer.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        if not page["has_more"]:
            sys.stdout.buffer.flush()
            return
        cursor = page["cursor"]


def _row(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    from datetime import datetime

    from service.cli.bill import dollars

    counts = batch["request_counts"]
    created = datetime.fromtimestamp(batch["created_at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    done = counts["completed"] + counts["failed"]
    lines = f"{done}/{counts['total']}" if counts["total"] else ""
    amount = (batch.get("cost") or {}).get("amount")
    return batch["id"], batch["status"], created, lines, counts["failed"] or "", batch.get("model"), dollars(amount) if amount else ""


def _pairs(items: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"--metadata takes KEY=VALUE, got {item!r}.")
        pairs[key] = value
    return pairs
