"""`longdraft run --trace` and `longdraft replay`, from the command line's side."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.cli.output import Failure
from tests.tiny_model import make_tiny_model


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    job, path = folder / "job.jsonl", folder / "trace.jsonl"
    body = {"model": "any", "max_tokens": 20, "temperature": 0}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": f"{n} la la la la"}} for n in range(6)
    ]
    job.write_text("\n".join(map(json.dumps, lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGDRAFT_CACHE_DIR", str(folder / "cache"))
        result = invoke("run", job, "-o", folder / "out.jsonl", "--model", make_tiny_model(folder / "model"), "--trace", path, "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["peak_rss_bytes"] > summary["kv_peak_bytes"] > 0
    return path


def test_policies_and_batch_sizes_are_predicted(trace):
    result = invoke("replay", trace, "--policy", "plain", "--policy", "fixed-4", "--max-sequences", 2, "--max-sequences", 6, "--json")
    report = json.loads(result.stdout)
    assert report["measured"]["requests"] == report["measured"]["answered"] == 6
    assert [(row["policy"], row["max_sequences"]) for row in report["predictions"]] == [
        ("plain", 2),
        ("plain", 6),
        ("fixed-4", 2),
        ("fixed-4", 6),
    ]
    plain, fixed = report["predictions"][1], report["predictions"][3]
    assert plain["verified"] == 0 < fixed["verified"]
    assert all(row["tokens_per_second"] > 0 for row in report["predictions"])
    assert "fixed-4" in invoke("replay", trace, "--policy", "fixed-4").stdout


def test_what_is_wrong_is_said(trace, tmp_path):
    with pytest.raises(Failure, match="fixed-K"):
        invoke("replay", trace, "--policy", "best")
    with pytest.raises(Failure, match="nowhere"):
        invoke("replay", tmp_path / "nowhere")
    (tmp_path / "other").write_text("{}\n")
    with pytest.raises(Failure, match="line 1"):
        invoke("replay", tmp_path / "other")
    cut = tmp_path / "cut"
    cut.write_text("".join(line for line in trace.read_text().splitlines(keepends=True) if not line.startswith('{"end"')))
    with pytest.raises(Failure, match="before its first one ended"):
        invoke("replay", cut)


def test_the_version_is_the_packages():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"longdraft {version('longdraft')}\n")
    assert "self-hosted batch inference" in invoke("--help").stdout
