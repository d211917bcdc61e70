"""Commands that run a model in this process: run, verify, bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import AsJson, Failure, note, print_json

if TYPE_CHECKING:
    from service.cli.local_run import Tally
    from service.cli.verify import Report
    from service.config import Settings

Model = Annotated[str | None, typer.Option("--model", help="Run every line on this model: a registered name, a Hugging Face id or a path.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16, int8 (weights alone) (default: the settings', else the checkpoint's)."),
]
Drafter = Annotated[str, typer.Option("--drafter", help="auto, off, a drafter's name, or the folder or id of one.")]


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(verify)
    app.command()(bench)


def run(
    job: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line, in OpenAI's batch format.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the answers go; failed lines go to OUT.errors.jsonl.")],
    model: Model = None,
    dtype: Dtype = None,
    drafter: Drafter = "auto",
    trace: Annotated[Path | None, typer.Option("--trace", help="Record what the engine does, for `longdraft replay`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run one job in this process, without any service. Exit code 1 if a line failed."""
    from service.bootstrap import make_runner
    from service.cli.batch_cmds import errors_path, require_place
    from service.cli.local_run import read_job, run_job
    from service.cli.progress import RunBar

    require_place(output, job)
    settings, resolve = with_model(model, dtype)
    if trace is not None:
        require_place(trace, job, output, errors_path(output))
        settings = settings.model_copy(update={"engine": settings.engine.model_copy(update={"trace": trace})})
    if drafter != "auto":
        settings = settings.model_copy(update={"engine": settings.engine.model_copy(update={"drafter": drafter})})
    limits = settings.limits
    plan = read_job(job, resolve, max_line_bytes=limits.max_line_bytes, max_json_depth=limits.max_json_depth)
    runner = make_runner(settings)
    try:
        with RunBar(plan.total, quiet=as_json) as bar:
            tally = run_job(plan, job, output, runner, drafter="auto", tick=bar.update)
            kv_peak_bytes = runner.stats().kv_peak_bytes
    finally:
        runner.close()
    summary = _summary(tally, plan.total, output, list(plan.by_model), runner.device)
    summary |= {"peak_rss_bytes": _peak_rss(), "kv_peak_bytes": kv_peak_bytes}
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)
    if tally.failed:
        raise typer.Exit(1)


def verify(
    batch_id: Annotated[str, typer.Argument(metavar="BATCH", help="An ended batch (batch_...).")],
    sample: Annotated[int, typer.Option("--sample", min=1, help="How many of its answers to run again.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Run some of a batch's lines again in this process, without speculation, and compare. Exit code 1 for more than ties."""
    from service.bootstrap import make_runner
    from service.cli import verify as verifying
    from service.cli.connect import connect, settings

    with connect() as server:
        batch = server.get(f"/batches/{batch_id}")
        if batch["output_file_id"] is None:
            raise Failure(f"Batch {batch_id} is {batch['status']} and has no output file: there is nothing to compare.")
        answers = verifying.sample(verifying.lines_of(server.download(batch["output_file_id"])), sample, batch_id)
        lines = verifying.with_requests(answers, verifying.lines_of(server.download(batch["input_file_id"])))
    runner = make_runner(settings())
    try:
        report = verifying.compare(lines, runner)
    finally:
        runner.close()
    if as_json:
        print_json({"batch": batch_id, "sampled": len(lines), **report.as_json()})
    else:
        _print_verified(batch_id, len(lines), report)
    if not report.passed:
        raise typer.Exit(1)


def bench(
    job: Annotated[Path, typer.Argument(metavar="JOB.jsonl", help="Requests in OpenAI's batch format; they are run greedily.")],
    config: Annotated[
        list[str] | None,
        typer.Option("--config", help="Repeatable: settings of a run of ours: drafter=off,max_sequences=8 (default: drafter=auto)."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Repeatable: transformers, vllm, openvino, each at its best batch size."),
    ] = None,
    peer_drafts: Annotated[bool, typer.Option("--peer-drafts", help="Run the comparisons with their own speculation too.")] = False,
    contenders: Annotated[
        bool,
        typer.Option("--contenders", help="Repeat only the comparisons near the fastest; try the others once, stopped at twice its time."),
    ] = False,
    model: Model = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Number format of every configuration.")] = "float32",
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            "--batch-sizes", help="What the comparisons try, once (8,16,32,64); the best is repeated. With --paper: figure 8's (1,4,16,64)."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Interleaved runs of each configuration.")] = 3,
    lines: Annotated[int | None, typer.Option("--lines", min=1, help="Only the first N lines.")] = None,
    check: Annotated[bool, typer.Option(help="Compare the answers with one-by-one generation (slow the first time, then cached).")] = True,
    bound: Annotated[bool, typer.Option(help="Measure the fastest matrix product, and what it allows for this job.")] = True,
    plot: Annotated[Path | None, typer.Option("--plot", help="A chart: FILE.png, .svg or .pdf.")] = None,
    peers: Annotated[Path | None, typer.Option("--peers", help="Folder of the peers' environments (default: build/peers).")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Instead: figures 2, 5, 6 and 8 of the DSpark paper, of this job.")] = False,
    dollars_per_hour: Annotated[
        float | None, typer.Option("--dollars-per-hour", min=0.0, help="Of this machine, for --paper (default: by the settings' [rates]).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second on a job, load excluded, each run in a process of its own, beside what you would use instead."""
    from service.cli.bench.peers import FOLDER
    from service.cli.bench.plan import BenchRequest
    from service.cli.bench.plot import check_plot, plot_bench
    from service.cli.bench.report import print_bench
    from service.cli.bench.session import run_bench

    if plot is not None:
        check_plot(plot)
    settings, resolve = with_model(model, None)
    request = BenchRequest.of(
        job,
        settings=settings,
        resolve_model=resolve,
        dtype=dtype,
        configurations=config or ["drafter=auto"],
        compare=compare or [],
        peer_drafts=peer_drafts,
        contenders=contenders,
        batch_sizes=batch_sizes or ("1,4,16,64" if paper else "8,16,32,64"),
        repeats=repeats,
        limit=lines,
        check=check,
        bound=bound,
        peers_folder=peers or Path(FOLDER),
    )
    if paper:
        from service.cli.bench.paper import of_request, plot_paper, print_paper

        figures = of_request(request, dollars_per_hour, (lambda _: None) if as_json else note)
        if plot is not None:
            plot_paper(figures, plot)
        print_json(figures) if as_json else print_paper(figures)
        return
    report = run_bench(request, cache_dir=settings.cache_dir, quiet=as_json)
    if plot is not None:
        plot_bench(report, plot)
    print_json(report) if as_json else print_bench(report)


def with_model(model: str | None, dtype: str | None) -> tuple[Settings, Any]:
    """The settings and the resolver of line models, with `--model` and `--dtype` applied: a name that is not registered is a source."""
    from service.config import ModelEntry, load_settings

    settings = load_settings()
    if dtype is not None:
        settings = settings.model_copy(update={"engine": settings.engine.model_copy(update={"dtype": dtype})})
    if model is None:
        return settings, settings.resolve_model
    name = settings.resolve_model(model)
    if name is None:
        name = Path(model).name
        settings = settings.model_copy(update={"models": {**settings.models, name: ModelEntry(source=model)}})
    chosen = name
    return settings, lambda _: chosen


def _summary(tally: Tally, total: int, output: Path, models: list[str], device: str) -> dict[str, Any]:
    from service.cli.batch_cmds import errors_path

    work, usage = tally.work, tally.usage
    return {
        "lines": total,
        "completed": tally.completed,
        "failed": tally.failed,
        "output": str(output),
        "errors": str(errors_path(output)) if tally.failed else None,
        "models": models,
        "device": device,
        "load_seconds": round(tally.load_seconds, 3),
        "seconds": round(tally.seconds, 3),
        "tokens_per_second": round(tally.tokens_per_second or 0.0, 2),
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "acceptance_length": round(tally.acceptance_length, 3) if tally.acceptance_length else None,
        "drafted_tokens": work.drafted,
        "verified_tokens": work.verified,
        "accepted_tokens": work.accepted,
    }


def _peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _print_verified(batch_id: str, sampled: int, report: Report) -> None:
    for difference in report.differences:
        gap = "not among the likeliest" if difference.gap is None else f"{difference.gap:.6f}{' (a tie)' if difference.tie else ''}"
        where = f"{difference.custom_id}, choice {difference.choice}, character {difference.at}"
        print(f"{where}: delivered {difference.delivered!r}, plain {difference.plain!r}, logit gap {gap}")
    for custom_id, reason in report.failed:
        print(f"{custom_id}: could not be run again: {reason}")
    for delivered, here in report.made:
        print(f"delivered by {_made(delivered)}; run again by {_made(here)}")
    rest = f"; {report.unrepeatable} were sampled without a seed and cannot be compared" if report.unrepeatable else ""
    note(f"{batch_id}: {report.equal} of {report.compared} answers are the same ({sampled} sampled{rest})")


def _made(made: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made.items()) or "a server that does not say"


def _print_summary(summary: dict[str, Any]) -> None:
    print(summary["output"])
    if summary["errors"]:
        print(summary["errors"])
    note(
        f"{summary['completed']} of {summary['lines']} lines answered, {summary['failed']} failed; "
        f"{summary['output_tokens']} tokens in {summary['seconds']:.1f} s ({summary['tokens_per_second']:.0f} tok/s, load excluded); "
        f"{summary['accepted_tokens']} of {summary['verified_tokens']} verified draft tokens accepted"
    )
