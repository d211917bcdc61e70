"""A benchmark's figures as a table."""

from __future__ import annotations

from typing import Any

from service.cli.output import note, print_table


def print_bench(report: dict[str, Any]) -> None:
    """The runs, best first, each with its ratio to the slowest."""
    runs = sorted(report["runs"], key=lambda run: -run["tokens_per_second"]["median"])
    slowest = runs[-1]["tokens_per_second"]["median"]
    columns = ("configuration", "tok/s", "min", "max", "ratio", "peak memory", "as the reference")
    print_table(columns, (_row(run, slowest) for run in runs), title=f"{report['job']} on {report['device']}", right=columns[1:])
    note("Tokens generated per second, prefill included, loading excluded; the median of the runs.")


def _row(run: dict[str, Any], slowest: float) -> tuple[str, ...]:
    speed, identical = run["tokens_per_second"], run["identical_to_reference"]
    return (
        run["name"],
        f"{speed['median']:.1f}",
        f"{speed['min']:.1f}",
        f"{speed['max']:.1f}",
        f"{speed['median'] / slowest:.2f}x",
        f"{run['peak_rss_bytes'] / (1 << 20):.0f} MiB",
        f"{identical[0]} of {identical[1]}" if identical else "not checked",
    )
