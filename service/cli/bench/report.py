"""A benchmark's figures as a table."""

from __future__ import annotations

from typing import Any

from service.cli.output import note, print_table


def print_bench(report: dict[str, Any]) -> None:
    """The runs, best first; how much faster the first configuration is than each of the others; the bound."""
    runs = sorted(report["runs"], key=lambda run: -run["tokens_per_second"]["median"])
    ratios = {ratio["to"]: ratio for ratio in report["ratios"]}
    first = report["runs"][0]["name"]
    columns = ("configuration", "tok/s", "min", "max", "first is", "of the bound", "peak memory", "as the reference")
    rows = (_row(run, ratios.get(run["name"])) for run in runs)
    print_table(columns, rows, title=f"{report['job']}, {report['lines']} lines, on {report['device']}", right=columns[1:])
    note("Tokens generated per second, prefill included, loading excluded; the median of the runs.")
    if report["ratios"]:
        confidence = report["ratios"][0]["confidence"]
        note(f"'first is': {first} against it, paired runs; median [interval that covers the true median with {confidence:.0%}].")
    if (bound := report.get("bound")) is not None:
        note(
            f"Bound {bound['tokens_per_second']} tok/s (without shared prefixes {bound['tokens_per_second_without_sharing']}): "
            f"{bound['distinct_prompt_positions']} of {bound['prompt_positions']} prompt positions and {bound['output_tokens']} "
            f"generated ones, {bound['body_seconds'] * 1e3:.3f} ms each ({bound['gflops']:.0f} GFLOP/s), and "
            f"{bound['head_seconds'] * 1e3:.3f} ms for the head, medians of {len(bound['stretches'])} stretches between the runs "
            f"(at the best moment: {bound['tokens_per_second_at_best']} tok/s)."
        )


def _row(run: dict[str, Any], ratio: dict[str, Any] | None) -> tuple[str, ...]:
    speed, identical = run["tokens_per_second"], run["identical_to_reference"]
    return (
        run["name"],
        f"stopped at {run['seconds'][0]:.0f} s" if run["stopped"] else f"{speed['median']:.1f}",
        f"{speed['min']:.1f}",
        f"{speed['max']:.1f}",
        f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
        f"{run['of_bound']:.0%}" if "of_bound" in run else "",
        f"{run['peak_rss_bytes'] / (1 << 20):.0f} MiB",
        f"{identical[0]} of {identical[1]}" if identical else "not checked",
    )
