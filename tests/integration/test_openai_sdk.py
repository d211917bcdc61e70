"""The stock `openai` SDK, validating strictly, against the real server."""

from __future__ import annotations

import io

import openai
import pytest

from service.domain.job import BatchStatus, InputError
from service.domain.usage import Usage
from tests.integration.api_server import LINE, ApiServer, Tenant

WINDOW = "24h"


def test_files_from_upload_to_deletion(tenant: Tenant) -> None:
    sdk = tenant.sdk()
    created = sdk.files.create(file=("mein job.jsonl", io.BytesIO(LINE * 3)), purpose="batch")
    assert (created.filename, created.bytes, created.purpose, created.status) == ("mein job.jsonl", 3 * len(LINE), "batch", "processed")
    assert sdk.files.retrieve(created.id) == created
    assert sdk.files.content(created.id).read() == LINE * 3
    assert sdk.files.wait_for_processing(created.id).id == created.id
    with sdk.files.with_streaming_response.content(created.id) as answer:
        assert b"".join(answer.iter_bytes()) == LINE * 3
    deleted = sdk.files.delete(created.id)
    assert (deleted.id, deleted.deleted) == (created.id, True)
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(created.id)


def test_file_expiry_is_shown(tenant: Tenant) -> None:
    created = tenant.sdk().files.create(file=LINE, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert created.expires_at == created.created_at + 3600


def test_file_pages_in_both_orders(tenant: Tenant) -> None:
    sdk = tenant.sdk()
    ids = [sdk.files.create(file=(f"{n}.jsonl", LINE), purpose="batch").id for n in range(5)]
    assert [file.id for file in sdk.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in sdk.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in sdk.files.list(limit=2, order="asc", after=ids[2])] == ids[3:]
    assert [file.id for file in sdk.files.list()] == ids[::-1]
    first = sdk.files.list(limit=2)
    assert (first.has_more, first.data[-1].id) == (True, ids[3])
    assert list(sdk.files.list(purpose="batch_output")) == []


def test_a_batch_from_creation_to_cancellation(tenant: Tenant) -> None:
    sdk = tenant.sdk()
    file = sdk.files.create(file=LINE, purpose="batch")
    batch = sdk.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"team": "search"},
        output_expires_after={"anchor": "created_at", "seconds": 86400},
        extra_body={"priority": 3, "on_invalid_line": "skip", "drafter": "off"},
    )
    assert (batch.status, batch.input_file_id, batch.metadata) == ("validating", file.id, {"team": "search"})
    assert batch.expires_at == batch.created_at + 86400
    assert batch.request_counts is not None
    assert batch.request_counts.total == 0
    extras = batch.model_extra or {}
    assert (extras["priority"], extras["on_invalid_line"], extras["drafter"]) == (3, "skip", "off")
    assert extras["cost"] == {"amount": "0", "currency": "usd", "final": False}
    assert sdk.batches.retrieve(batch.id) == batch
    cancelled = sdk.batches.cancel(batch.id)
    assert (cancelled.id, cancelled.status) == (batch.id, "cancelling")
    assert sdk.batches.cancel(batch.id).status == "cancelling"


def test_batch_pages(tenant: Tenant) -> None:
    sdk = tenant.sdk()
    file = sdk.files.create(file=LINE, purpose="batch")
    ids = [
        sdk.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"n": str(n)}).id
        for n in range(5)
    ]
    assert [batch.id for batch in sdk.batches.list(limit=2)] == ids[::-1]
    page = sdk.batches.list(limit=2, after=ids[3])
    assert ([batch.id for batch in page.data], page.has_more) == ([ids[2], ids[1]], True)


def test_every_field_of_an_ended_batch_passes_the_strict_types(api: ApiServer, tenant: Tenant) -> None:
    sdk = tenant.sdk()
    file = sdk.files.create(file=LINE, purpose="batch")
    created = sdk.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    output = api.put_file(tenant.project_id, b'{"id": "batch_req_1"}\n')
    with api.services.database.begin() as uow:
        batch = uow.batches.load(created.id, lock=True)
        batch = batch.to(BatchStatus.IN_PROGRESS, uow.now, model="m", total=4)
        uow.batches.save(batch)
        uow.batches.count(batch.id, completed=3, failed=1, usage=Usage(100, 40, 30, 5))
        batch = uow.batches.load(created.id).to(BatchStatus.FINALIZING, uow.now, outcome=BatchStatus.COMPLETED)
        uow.batches.save(batch)
        uow.batches.save(batch.to(BatchStatus.COMPLETED, uow.now, output_file_id=output.id))
    shown = sdk.batches.retrieve(created.id)
    assert (shown.status, shown.model, shown.output_file_id, shown.error_file_id) == ("completed", "m", output.id, None)
    assert shown.request_counts is not None
    assert (shown.request_counts.total, shown.request_counts.completed, shown.request_counts.failed) == (4, 3, 1)
    assert shown.usage is not None
    assert (shown.usage.input_tokens, shown.usage.output_tokens, shown.usage.total_tokens) == (100, 30, 130)
    assert shown.usage.input_tokens_details.cached_tokens == 40
    assert shown.usage.output_tokens_details.reasoning_tokens == 5
    assert None not in (shown.in_progress_at, shown.finalizing_at, shown.completed_at)
    assert (shown.model_extra or {})["cost"]["final"] is True
    assert output.id in [file.id for file in sdk.files.list(purpose="batch_output")]
    assert sdk.files.content(output.id).text == '{"id": "batch_req_1"}\n'
    with pytest.raises(openai.ConflictError):
        sdk.batches.cancel(created.id)


def test_a_failed_batch_lists_its_errors(api: ApiServer, tenant: Tenant) -> None:
    sdk = tenant.sdk()
    created = sdk.batches.create(input_file_id=tenant.upload(), endpoint="/v1/chat/completions", completion_window="24h")
    with api.services.database.begin() as uow:
        batch = uow.batches.load(created.id, lock=True)
        problems = (InputError("invalid_json_line", "Line 3 is not JSON.", line=3), InputError("empty_file", "No lines."))
        uow.batches.save(batch.to(BatchStatus.FAILED, uow.now, errors=problems))
    shown = sdk.batches.retrieve(created.id)
    assert shown.errors is not None
    assert shown.errors.object == "list"
    assert [(e.code, e.line) for e in shown.errors.data or []] == [("invalid_json_line", 3), ("empty_file", None)]


def test_models_and_aliases(tenant: Tenant) -> None:
    sdk = tenant.sdk()
    listed = {model.id: model for model in sdk.models.list()}
    assert {"smollm2-135m", "gpt-4o-mini"} <= set(listed)
    alias = sdk.models.retrieve("gpt-4o-mini")
    assert (alias.id, (alias.model_extra or {})["root"]) == ("gpt-4o-mini", "smollm2-135m")
    assert sdk.models.retrieve("smollm2-135m") == listed["smollm2-135m"]
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("org/unknown")


def test_errors_are_the_sdk_s_own(tenant: Tenant) -> None:
    sdk = tenant.sdk()
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.batches.retrieve("batch_unknown")
    assert (missing.value.code, missing.value.type) == ("not_found", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.batches.create(input_file_id="file-x", endpoint="/v1/embeddings", completion_window="24h")
    assert bad.value.param == "endpoint"
    assert "/v1/chat/completions" in bad.value.message
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="ld-wrong").files.list()


def test_a_blind_repeat_of_the_sdk_makes_one_batch(tenant: Tenant) -> None:
    """The SDK's own repeat after an answer that got lost: same body, `x-stainless-retry-count: 1`."""
    sdk, file_id = tenant.sdk(), tenant.upload()
    create = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": WINDOW}
    first = tenant.http.post("/v1/batches", json=create, headers={"x-stainless-retry-count": "0"}).json()["id"]
    again = tenant.http.post("/v1/batches", json=create, headers={"x-stainless-retry-count": "1"}).json()["id"]
    assert again == first
    assert [batch.id for batch in sdk.batches.list()] == [first]
