"""The estimate before against the bill after; nothing is created on the way."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.adapters.engine_runner import EngineRunner
from service.adapters.memory import MemoryBlobStore
from service.adapters.token_counter import LocalTokenizers
from service.cli.main import app
from service.config import EngineSettings, Limits, ModelEntry
from service.domain.job import OnInvalidLine
from service.usecases.estimate import DryRun, Tokenizers, estimate_batch
from service.usecases.keys import Caller
from service.usecases.submit import BatchRequest
from tests.bad_input import ENDPOINT, MODEL, body, good
from tests.integration.api_server import ApiServer, Tenant
from tests.integration.jobs import Jobs, lines, settings_for
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def jobs(database: Any, tmp_path: Path) -> Jobs:
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path))


def estimate(jobs: Jobs, data: bytes, tokenizers: Tokenizers = lambda _: None, **changes: Any) -> DryRun:
    with jobs.database.begin() as uow:
        before = uow.batches.page(jobs.project.id, after=None, limit=100).items
    uploaded = jobs.submit(data)  # the easiest way to a stored file; the batch itself plays no part
    assert uploaded.input_file_id is not None
    request = BatchRequest(uploaded.input_file_id, ENDPOINT, "24h", **changes)
    caller = Caller(jobs.project.id, "key", ("read",))
    run = estimate_batch(
        request,
        caller=caller,
        database=jobs.database,
        blobs=jobs.blobs,
        buckets=jobs.buckets,
        limits=Limits(),
        resolve_model={MODEL: MODEL, "other": "other"}.get,
        tokenizers=tokenizers,
    )
    with jobs.database.begin() as uow:
        assert len(uow.batches.page(jobs.project.id, after=None, limit=100).items) == len(before) + 1
    return run


JOBS = {
    "short": lines(20, body=body(max_tokens=4, temperature=0)),
    "long": b"\n".join(
        good(f"c{n}", body=body(messages=[{"role": "user", "content": "tell me " * n}], max_tokens=60)) for n in range(1, 20)
    ),
    "mixed": b"\n".join(good(f"c{n}", body=body(max_tokens=n, temperature=0)) for n in range(1, 40)),
}


@pytest.mark.parametrize("name", JOBS)
def test_the_bill_lies_within_the_estimate(name: str, jobs: Jobs, folder: Path, tmp_path: Path) -> None:
    """A real engine, its prompts counted without it."""
    models = {MODEL: ModelEntry(source=str(folder))}
    run = estimate(jobs, JOBS[name], LocalTokenizers(models, tmp_path).for_model)
    least, expected, most = (run.estimate.total(which) for which in range(3))
    assert least <= expected <= most
    assert run.errors == ()
    batch = jobs.run(JOBS[name])
    jobs.drain(runner=EngineRunner(models, EngineSettings(device="cpu", kv_memory="4MiB", threads=1), tmp_path))
    batch = jobs.finalize(batch)
    with jobs.database.begin() as uow:
        billed = uow.ledger.batch_total(batch.id).total
    assert least <= billed <= most
    (price,) = run.estimate.prices
    assert price.prompt_tokens == batch.usage.input_tokens


def test_history_makes_it_better(jobs: Jobs) -> None:
    data = lines(10, body=body(max_tokens=1000))
    blind = estimate(jobs, data).estimate
    batch = jobs.complete(data)
    informed = estimate(jobs, data).estimate
    with jobs.database.begin() as uow:
        usage, billed = uow.batches.load(batch.id).usage, uow.ledger.batch_total(batch.id).total
    assert blind.prices[0].answer_tokens == (10, 5000, 10_000)
    assert informed.prices[0].answer_tokens == (10, usage.output_tokens, 10_000)
    assert abs(informed.total(1) - billed) < abs(blind.total(1) - billed)


def test_what_would_fail_is_said(jobs: Jobs) -> None:
    data = b"\n".join([good("a"), good("a"), good("b", url="/v1/nowhere"), good("c", body=body(temperature=9))])
    run = estimate(jobs, data)
    assert (run.total, run.invalid) == (4, 3)
    assert [(error.line, error.code) for error in run.errors] == [(2, "duplicate_custom_id"), (3, "url_mismatch")]
    skipped = estimate(jobs, data, on_invalid_line=OnInvalidLine.SKIP)
    assert skipped.errors == ()
    assert skipped.estimate.prices == run.estimate.prices


def test_what_the_chat_template_refuses_is_not_priced(jobs: Jobs, folder: Path, tmp_path: Path) -> None:
    counted = LocalTokenizers({MODEL: ModelEntry(source=str(folder))}, tmp_path).for_model
    refused = good("b", body=body(messages=[{"role": "assistant", "content": "I begin"}]))
    run = estimate(jobs, b"\n".join([good("a"), refused]), counted)
    assert (run.total, run.invalid) == (2, 1)
    assert run.estimate.prices == estimate(jobs, good("a"), counted).estimate.prices


def test_an_empty_file(jobs: Jobs) -> None:
    run = estimate(jobs, b"\n\n")
    assert [error.code for error in run.errors] == ["empty_file"]
    assert run.estimate.total(2) == 0


def test_answers_without_a_limit_are_assumed_and_said(jobs: Jobs) -> None:
    unlimited = {name: value for name, value in body().items() if name != "max_tokens"}
    run = estimate(jobs, good("a", body=unlimited))
    assert run.estimate.prices[0].answer_tokens[2] == 8192
    assert "without a limit" in run.estimate.assumptions[MODEL]
    assert "guessed" in run.estimate.assumptions[MODEL]


# --- over HTTP ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["estimate", "dry_run"])
def test_over_http(way: str, tenant: Tenant, api: ApiServer) -> None:
    request = {"input_file_id": tenant.upload(lines(3)), "endpoint": ENDPOINT, "completion_window": "24h"}
    if way == "dry_run":
        answer = tenant.http.post("/v1/batches", json={**request, "dry_run": True})
    else:
        answer = tenant.http.post("/v1/batches/estimate", json=request)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["object"], found["lines"], found["invalid_lines"], found["errors"]["data"]) == ("batch.estimate", 3, 0, [])
    assert 0 < Decimal(found["amount"]["min"]) <= Decimal(found["amount"]["expected"]) <= Decimal(found["amount"]["max"])
    assert found["models"][0]["model"] == MODEL
    assert tenant.http.get("/v1/batches").json()["data"] == []


def test_other_tenants_files_and_bad_bodies(tenant: Tenant, stranger: Tenant) -> None:
    request = {"input_file_id": stranger.upload(), "endpoint": ENDPOINT, "completion_window": "24h"}
    assert tenant.http.post("/v1/batches/estimate", json=request).status_code == 404
    assert tenant.http.post("/v1/batches/estimate", json={**request, "endpoint": "/v1/x"}).status_code == 400


def test_a_cap_over_http(tenant: Tenant) -> None:
    answer = tenant.create(max_cost="0.0125")
    assert answer.json()["max_cost"] == "0.0125"
    assert tenant.http.get(f"/v1/batches/{answer.json()['id']}").json()["max_cost"] == "0.0125"
    assert tenant.create(max_cost="much").json()["error"]["param"] == "max_cost"
    sdk = tenant.sdk().batches
    made = sdk.create(input_file_id=tenant.upload(), endpoint=ENDPOINT, completion_window="24h", extra_body={"max_cost": 1.5})
    assert made.model_extra is not None
    assert made.model_extra["max_cost"] == "1.5"


def test_from_the_command_line(tenant: Tenant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGDRAFT_URL", tenant.url)
    monkeypatch.setenv("LONGDRAFT_API_KEY", tenant.secret)
    job = tmp_path / "job.jsonl"
    job.write_bytes(lines(3))
    shown = CliRunner().invoke(app, ["submit", str(job), "--estimate"])
    assert shown.exit_code == 0, shown.output
    assert "prompt tokens" in shown.output
    assert tenant.http.get("/v1/files").json()["data"] == [], "the upload is removed again"
    assert tenant.http.get("/v1/batches").json()["data"] == []
    job.write_bytes(lines(2) + lines(1))
    broken = CliRunner().invoke(app, ["submit", str(job), "--estimate"])
    assert broken.exit_code == 1
    assert "line 3: duplicate_custom_id" in broken.output
    refused = CliRunner().invoke(app, ["submit", str(job), "--max-cost", "much"])
    assert refused.exit_code == 1
    assert tenant.http.get("/v1/files").json()["data"] == [], "a refused create leaves no upload behind"
    made = CliRunner().invoke(app, ["submit", str(job), "--max-cost", "0.5", "--json"])
    assert json.loads(made.stdout.splitlines()[-1])["max_cost"] == "0.5"
