"""The registered acceptance checks: one command each, and how its output is judged. Adding one is an entry in CHECKS."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
"""Where the benchmark jobs lie beside a checkout of the maintainers; `--data` names another folder."""

Judged = tuple[Any, bool]
"""(figure, whether it meets the goal)."""
Judge = Callable[[str, int], Judged]
"""(stdout, exit code) -> figure and verdict."""


@dataclass(frozen=True, slots=True)
class Check:
    """`{data}` in an argument of the command stands for the data folder; `needs` are files in it."""

    name: str
    goal: str
    command: Sequence[str]
    judge: Judge
    needs: tuple[str, ...] = ()
    seconds: int = 1800


def tests_pass(stdout: str, status: int) -> Judged:
    """pytest's own summary; a run in which everything was skipped does not pass."""
    counts = {
        name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|error|skipped)", stdout.splitlines()[-1] if stdout else "")
    }
    return counts, status == 0 and counts.get("passed", 0) > 0 and not counts.get("skipped")


def own_verdict(stdout: str, status: int) -> Judged:
    """For commands that print one JSON object with `pass`."""
    figure = last_json(stdout)
    return {name: value for name, value in figure.items() if name not in ("pass", "goal")}, status == 0 and bool(figure.get("pass"))


def faster_than_peer(ratio: float) -> Judge:
    """For `longdraft bench --compare`: Longdraft's median against the peer's, and every answer as the reference."""

    def judge(stdout: str, status: int) -> Judged:
        report = last_json(stdout)
        runs = {run["kind"]: run for run in report.get("runs", ())}
        if status or runs.keys() != {"longdraft", "transformers"}:
            return report, False
        ours, theirs = (runs[name]["tokens_per_second"]["median"] for name in ("longdraft", "transformers"))
        same, of = runs["longdraft"]["identical_to_reference"]
        figure = {"ratio": round(ours / theirs, 3), "longdraft": ours, "transformers": theirs, "identical_to_reference": [same, of]}
        return figure, ours >= ratio * theirs and same >= of - 2

    return judge


def measured(stdout: str, status: int) -> Judged:
    """For benchmarks that print one JSON object with `rows`."""
    report = last_json(stdout)
    figure = {"device": report.get("device"), "rows": len(report.get("rows", ()))}
    return figure, status == 0 and figure["rows"] > 0


def last_json(stdout: str) -> dict[str, Any]:
    """The last line that is a JSON object; empty if there is none."""
    for line in reversed(stdout.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def pytest(*arguments: str) -> Sequence[str]:
    return (sys.executable, "-m", "pytest", "-q", *arguments)


def module(name: str, *arguments: str) -> Sequence[str]:
    return (sys.executable, "-m", name, *arguments)


def bench(job: str) -> Sequence[str]:
    return module("service.cli.main", "bench", f"{{data}}/{job}", "--compare", "transformers", "--json")


CHECKS: Sequence[Check] = (
    Check(
        "main-job/fresh-clone",
        "make demo ends with results and a bill (second run < 120 s), .ci/run passes (< 1200 s with installation)",
        module("tests.acceptance.fresh_clone"),
        own_verdict,
        seconds=3600,
    ),
    Check(
        "main-job/openai-sdk",
        "the stock SDK with strict validation does files, batches and models without an error",
        pytest("tests/integration/test_openai_sdk.py"),
        tests_pass,
    ),
    Check(
        "main-job/exactness",
        ">= 62 of 64 answers equal transformers' generate, the others differ at a tie; drafting on and off, at 1, 8 and 64 sequences",
        pytest("tests/acceptance/test_exactness.py", "--data", "{data}"),
        tests_pass,
        needs=("bench_mixed.jsonl",),
    ),
    Check(
        "main-job/bench-mixed",
        ">= 1.5x transformers' generate at its best batch size",
        bench("bench_mixed.jsonl"),
        faster_than_peer(1.5),
        ("bench_mixed.jsonl",),
        3600,
    ),
    Check(
        "main-job/bench-copy",
        ">= 1.5x transformers' generate at its best batch size",
        bench("bench_copy.jsonl"),
        faster_than_peer(1.5),
        ("bench_copy.jsonl",),
        3600,
    ),
    Check(
        "main-job/worker-killed",
        "a job of 200 lines survives SIGKILL of its worker, also between segment and commit; only uncommitted lines run twice",
        pytest("tests/faults/test_worker_death.py", "-k", "200_line_job or point_of_the_protocol"),
        tests_pass,
    ),
    Check(
        "main-job/external-services",
        "another PostgreSQL, broker and S3 over HTTP; two workers deliver at least a quarter of the lines each",
        pytest("tests/faults/test_two_workers.py"),
        tests_pass,
    ),
    Check(
        "main-job/intake",
        "50,000 lines (200 MB) validated and grouped in <= 60 s and <= 300 MB",
        module("tests.benchmarks.intake", "--json"),
        own_verdict,
    ),
    Check(
        "main-job/bad-input",
        "every case of bad files and bad creates gets what is documented",
        pytest(
            "tests/integration/test_bad_input_file_content.py",
            "tests/integration/test_api_batches.py",
            "tests/integration/test_api_files.py",
        ),
        tests_pass,
    ),
    Check(
        "main-job/hf-kernels",
        "transformers imports and runs beside our kernels package; Hugging Face's package of that name is refused by doctor",
        module("tests.acceptance.hf_kernels"),
        own_verdict,
    ),
    Check(
        "kernels/ahead-of-time",
        "every Triton kernel compiles to machine code for sm_80 and sm_90 without a device",
        module("tests.unit.kernels.triton.ahead_of_time"),
        own_verdict,
        seconds=3600,
    ),
    Check(
        "s3/bucket-to-bucket",
        "a job from a bucket to a bucket by CLI, SDK and plain HTTP: objects, manifest, cost.json, the bill recomputed to the digit",
        pytest("tests/integration/test_bucket_cli.py", "tests/integration/test_presigned.py"),
        tests_pass,
    ),
    Check(
        "s3/real-store",
        "wrong credentials refused by a server that checks them; conditional writes, multipart, 5xx retries, lost replies over HTTP",
        pytest("tests/contract/test_blobs_s3.py", "tests/integration/bucket_jobs"),
        tests_pass,
    ),
    Check(
        "kernels/benchmark",
        "the kernel benchmark runs end to end (at tiny size without a GPU, where its rates mean nothing)",
        module("tests.benchmarks.kernels", "--json"),
        measured,
    ),
    Check(
        "kernels/engine-benchmark",
        "the GPU engine benchmark runs end to end, transformers beside it (at tiny size without a GPU)",
        module("tests.benchmarks.gpu_engine", "--json"),
        measured,
    ),
    Check(
        "drafters/exactness",
        "every drafter and the portfolio change no greedy answer and no distribution; choosing by realised drafts is shown to be biased",
        pytest("tests/unit/engine/test_drafter_exactness.py", "tests/unit/engine/drafters"),
        tests_pass,
    ),
    Check(
        "drafters/training",
        "training resumes to the same weights, keeps judged and benchmark prompts out, calibrates; adapting exchanges only for better",
        pytest("tests/unit/engine/training"),
        tests_pass,
    ),
    Check(
        "costs/ledger-sequences",
        "O1-O7 hold after 2,000 random sequences of submit, run, crash, retry, cancel, expire, reprice, reverse",
        module("tests.acceptance.ledger_sequences"),
        own_verdict,
        seconds=3600,
    ),
    Check(
        "costs/device-time",
        "attributed device seconds + idle + load + profile = worker wall time within 0.5%",
        pytest("tests/integration/test_device_time.py"),
        tests_pass,
    ),
    Check(
        "costs/reports",
        "three projects over several days: reports, CSV, chart, FOCUS, OpenAI's costs and usage through the stock SDK",
        pytest("tests/integration/test_cost_reports.py", "tests/integration/test_organization.py", "tests/unit/billing/test_focus.py"),
        tests_pass,
    ),
    Check(
        "costs/estimate-and-cap",
        "estimates hold the final cost of three jobs; a batch with max_cost ends under it",
        pytest("tests/integration/test_estimate.py", "tests/integration/test_max_cost.py"),
        tests_pass,
    ),
    Check(
        "costs/scale-from-zero",
        "0 -> 2 -> 0 workers; submit to first result split; a warm profile is reused; SIGTERM loses nothing, picked up in <= 5 s",
        module("tests.benchmarks.scale_from_zero", "--json"),
        own_verdict,
        seconds=1800,
    ),
    Check(
        "engine/offline-engines",
        "ratio to the best of transformers, vLLM and OpenVINO: mixed >= 1.05 (and >= 90% of the bound), copy >= 1.15, its first 8 lines "
        ">= 1.6, its first line >= 2, long >= 2",
        module("tests.benchmarks.offline_engines", "{data}", "--json"),
        own_verdict,
        ("bench_mixed.jsonl", "bench_copy.jsonl", "bench_long.jsonl"),
        seconds=4 * 3600,
    ),
    Check(
        "engine/speculation-pays",
        "1-256 sequences: planner against the better of plain and fixed 8: median >= 0.98 less the A/A half-width; cost model within 5%",
        module("tests.benchmarks.speculation_pays", "{data}/bench_mixed.jsonl", "{data}/bench_copy.jsonl", "--json"),
        own_verdict,
        ("bench_mixed.jsonl", "bench_copy.jsonl"),
        seconds=2 * 3600,
    ),
    Check(
        "engine/shared-prompts",
        "2,000 lines, ten prompts: a perfect cache's hit rate less 2 points, faster than unshared, last 5% of lines in < 15% of the time",
        module("tests.benchmarks.shared_prompts", "--json"),
        own_verdict,
        seconds=3600,
    ),
    Check(
        "engine/memory-budget",
        "a job that wants 4 GiB of KV cache ends in 1 GiB",
        module("tests.benchmarks.memory_budget", "--json"),
        own_verdict,
        seconds=3600,
    ),
    Check(
        "engine/replay-accuracy",
        "a replay predicts two policies within 10% of live runs, from either's trace, and ranks them right",
        module("tests.benchmarks.replay_accuracy", "{data}/bench_copy.jsonl", "--max-sequences", "8", "--json"),
        own_verdict,
        ("bench_copy.jsonl",),
        seconds=3600,
    ),
    Check(
        "main-job/many-batches",
        "100 batches at once, p95 of a status request <= 100 ms",
        module("tests.benchmarks.many_batches", "--json"),
        own_verdict,
    ),
    Check(
        "main-job/soak",
        "20 minutes, up to 100,000 requests, a worker killed every 15 s: every line delivered once, no oracle broken, flat memory",
        module("tests.benchmarks.soak", "--json"),
        own_verdict,
        seconds=3600,
    ),
    Check(
        "costs/operations",
        "health, readiness and metrics of every process, no prompt in any log, one worker a GPU, refusals with GiB",
        pytest("tests/integration/test_operations.py", "tests/integration/test_starts.py", "tests/contract/test_shared_cache.py"),
        tests_pass,
    ),
    Check(
        "costs/manifests",
        "all manifests validate, dashboard and alerts name metrics that exist, KEDA's query is due + leased in each state of a job",
        pytest("tests/unit/infra", "tests/integration/test_autoscaling.py"),
        tests_pass,
    ),
    Check(
        "main-job/storage-and-schema",
        "full broker, full disk, upload cut off, prices and schema changed in mid-batch: nothing lost, doubled or misbilled",
        pytest("tests/faults/test_storage_and_schema.py"),
        tests_pass,
    ),
    Check(
        "models/families",
        "each family's logits within 1e-4 of transformers' and greedy answers equal with drafts; switching off a feature fails",
        pytest("tests/unit/engine/models"),
        tests_pass,
    ),
    Check(
        "models/real-weights",
        "SmolLM2-135M and Gemma 3 270M: greedy answers equal generate on the dequantised weights, also from the command line",
        pytest("tests/acceptance/test_real_models.py"),
        tests_pass,
    ),
    Check(
        "requests/fields",
        "every field of the SDK's request types is supported (a test that exists) or refused (the message): service/REQUESTS.md",
        pytest("tests/unit/domain/test_request_fields.py"),
        tests_pass,
    ),
    Check(
        "requests/forms",
        "200 lines of six schemas: all valid, texts equal with and without drafts, drafts accepted, >= 0.98 of plain decoding's speed",
        module("tests.benchmarks.json_schema", "--json"),
        own_verdict,
        seconds=3600,
    ),
    Check(
        "requests/hostile-forms",
        "schemas and patterns compile within their time and memory, hold nobody up, and what cannot be held to is refused by name",
        pytest("tests/unit/engine/grammars", "tests/unit/adapters/test_engine_runner.py"),
        tests_pass,
    ),
    Check(
        "requests/several-answers",
        "eight answers to a prompt hold its KV cache once",
        module("tests.benchmarks.n_answers", "--json"),
        own_verdict,
    ),
    Check(
        "requests/log-probabilities",
        "log-probabilities of answers and prompts within 1e-4 of transformers', with drafts and without",
        pytest("tests/unit/engine/test_engine_on_llama.py", "-k", "log_probabilities or scored"),
        tests_pass,
    ),
    Check(
        "requests/exactness",
        "sampling with temperature, cuts, penalties and forms has its distribution under drafts (chi-square); mutants fail",
        pytest("tests/unit/engine/test_exactness.py", "tests/unit/engine/test_grammar_exactness.py"),
        tests_pass,
    ),
    Check(
        "requests/verify",
        "delivered answers are plain decoding's; one that was tampered with is found, with its logit gap",
        pytest("tests/unit/cli/test_verify.py", "tests/integration/test_verify_cli.py"),
        tests_pass,
    ),
)
