"""The policy lab: `replay`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import AsJson, Failure, console, note, print_json, print_table

if TYPE_CHECKING:
    from engine.lab.simulator import Simulation
    from engine.lab.trace import Trace


def register(app: typer.Typer) -> None:
    app.command()(replay)


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What `longdraft run --trace` wrote.")],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="Repeatable: plain, auto, fixed-K, recorded (default: recorded, plain, auto).")
    ] = None,
    max_sequences: Annotated[
        list[int] | None, typer.Option("--max-sequences", min=1, help="Repeatable: batch sizes (default: the trace's).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the throughput of a recorded job under other policies: real scheduler and planner, virtual time, no model."""
    from rich.progress import track

    from engine.lab.machine import RecordedMachine
    from engine.lab.replay import Policy, UnknownPolicyError
    from engine.lab.replay import replay as simulate
    from engine.lab.trace import TraceError, read_trace

    try:
        recorded = read_trace(trace)
        policies = [Policy.of(name, recorded) for name in policy or ("recorded", "plain", "auto")]
        machine = RecordedMachine(recorded)
    except OSError as error:
        raise Failure(f"Cannot read {trace}: {error.strerror or error}.") from None
    except (TraceError, UnknownPolicyError, ValueError) as error:
        raise Failure(f"{error}.") from None
    if not recorded.answered():
        raise Failure(f"{trace} has no answered request to replay: the run was stopped before its first one ended.")
    cases = [(one, size) for one in policies for size in max_sequences or [recorded.engine.max_sequences]]
    predictions = [
        _row(one.name, size, simulate(recorded, one, max_sequences=size, machine=machine))
        for one, size in track(cases, "replaying", console=console(stderr=True), transient=True, disable=as_json)
    ]
    report = {"trace": str(trace), "measured": _measured(recorded), "predictions": predictions}
    print_json(report) if as_json else _print(report)


def _measured(trace: Trace) -> dict[str, Any]:
    error = trace.model_error()
    return {
        "model": trace.engine.model,
        "requests": len(trace.requests),
        "answered": len(trace.answered()),
        "steps": len(trace.steps),
        "output_tokens": trace.generated,
        "seconds": round(trace.seconds, 3),
        "tokens_per_second": round(trace.tokens_per_second, 2),
        "cost_model_error_median": None if error is None else round(error, 4),
    }


def _row(name: str, size: int, result: Simulation) -> dict[str, Any]:
    return {
        "policy": name,
        "max_sequences": size,
        "tokens_per_second": round(result.tokens_per_second, 2),
        "seconds": round(result.seconds, 3),
        "steps": result.steps,
        "acceptance_length": round(result.acceptance_length, 3),
        "drafted": result.drafted,
        "verified": result.verified,
        "accepted": result.accepted,
        "cached_tokens": result.cached,
        "preemptions": result.preemptions,
    }


def _print(report: dict[str, Any]) -> None:
    measured = report["measured"]
    columns = ("policy", "sequences", "tok/s", "seconds", "steps", "acceptance length", "verified", "accepted")
    keys = ("policy", "max_sequences", "tokens_per_second", "seconds", "steps", "acceptance_length", "verified", "accepted")
    best = sorted(report["predictions"], key=lambda row: -row["tokens_per_second"])
    print_table(columns, ([row[key] for key in keys] for row in best), title=f"{report['trace']}: predicted", right=columns[1:])
    note(
        f"Measured when it was recorded: {measured['tokens_per_second']} tok/s, {measured['output_tokens']} tokens of "
        f"{measured['answered']} requests in {measured['seconds']} s and {measured['steps']} steps."
    )
