"""Creating batches: bad input, idempotence, races; reading them: paging, results while running, cost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.billing.ledger import charge, reversal
from service.domain.job import BatchStatus
from service.domain.line import LineOutcome, Outcome, Segment, StagedLine
from service.domain.money import Rates
from service.domain.result_lines import encode_result
from service.domain.usage import Usage
from service.usecases.status import KEEP_SECONDS, BatchViews
from tests.integration.api_server import ApiServer, Tenant
from tests.integration.test_api_files import refused

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"input_file_id": ...}, 400, "input_file_id"),
        ({"input_file_id": "file-unknown"}, 404, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, 404, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"endpoint": "/v1/responses"}, 400, "endpoint"),
        ({"endpoint": "/v1/images"}, 400, "endpoint"),
        ({"endpoint": None}, 400, "endpoint"),
        ({"completion_window": "tomorrow"}, 400, "completion_window"),
        ({"completion_window": "0h"}, 400, "completion_window"),
        ({"completion_window": "9999d"}, 400, "completion_window"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
        ({"priority": 10}, 400, "priority"),
        ({"on_invalid_line": "maybe"}, 400, "on_invalid_line"),
        ({"drafter": "../x"}, 400, "drafter"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
        ({"max_cost": -5}, 400, "max_cost"),
        ({"webhook": {"url": "https://example.com"}}, 400, "webhook"),
        ({"input_uri": "s3://bucket/key"}, 400, "input_uri"),
        ({"output_uri": "ftp://bucket/key"}, 400, "output_uri"),
        ({"dry_run": "yes"}, 400, "dry_run"),
        ({"unheard_of": 1}, 400, "unheard_of"),
    ],
)
def test_a_bad_create_is_refused_by_name(tenant: Tenant, changes: dict[str, Any], status: int, param: str) -> None:
    refused(tenant.create(**({"file_id": tenant.upload()} | changes)), status, param=param)
    assert tenant.http.get("/v1/batches").json()["data"] == []


def test_an_output_file_is_no_input(api: ApiServer, tenant: Tenant) -> None:
    output = api.put_file(tenant.project_id, b"{}\n")
    refused(tenant.create(output.id), 400, param="input_file_id")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"a": NaN}', 400),
        (rb'{"input_file_id": "file\u0000"}', 400),
        (b'{"metadata":' + b"[" * 300 + b"]" * 300 + b"}", 400),
        (b'{"metadata":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400),
        (b'{"metadata": {"a": "' + b"x" * (2 << 20) + b'"}}', 413),
        (b'{"priority": ' + b"9" * 5000 + b"}", 400),
    ],
    ids=["empty", "list", "truncated", "NaN", "NUL", "deep", "very deep", "large", "huge integer"],
)
def test_a_hostile_body_is_refused(tenant: Tenant, raw: bytes, status: int) -> None:
    refused(tenant.http.post("/v1/batches", content=raw, headers={"content-type": "application/json"}), status)


def test_a_compressed_body_is_refused(tenant: Tenant) -> None:
    refused(tenant.http.post("/v1/batches", content=b"{}", headers={"content-encoding": "gzip"}), 415)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
fields = ["input_file_id", "endpoint", "completion_window", "metadata", "priority", "drafter", "on_invalid_line", "output_expires_after"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(fields) | st.text(max_size=8), json_values, max_size=4), key=st.text(max_size=5) | st.none())
def test_no_json_body_makes_the_server_fail(tenant: Tenant, changes: dict[str, Any], key: str | None) -> None:
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"} | changes
    headers = {} if key is None else {b"idempotency-key": key.encode()}
    try:
        answer = tenant.http.post("/v1/batches", content=json.dumps(body), headers=headers)
    except httpx.LocalProtocolError:
        return  # a header that no client can send
    assert 400 <= answer.status_code < 500, answer.text
    assert set(answer.json()) == {"error"}


# --- the same create again ----------------------------------------------------------------------------------------------------


def test_two_deliberate_twins_are_two_batches(tenant: Tenant) -> None:
    file_id = tenant.upload()
    first, second = (tenant.create(file_id, headers={"x-stainless-retry-count": "0"}).json()["id"] for _ in range(2))
    assert first != second


def test_a_blind_repeat_finds_the_first_batch(tenant: Tenant) -> None:
    file_id = tenant.upload()
    first = tenant.create(file_id).json()["id"]
    assert tenant.create(file_id, headers={"x-stainless-retry-count": "2"}).json()["id"] == first
    assert tenant.create(file_id, headers={"x-stainless-retry-count": "1"}, priority=1).json()["id"] != first


def test_a_repeat_of_a_create_that_never_arrived_creates(tenant: Tenant) -> None:
    assert tenant.create(headers={"x-stainless-retry-count": "1"}).status_code == 200


def test_another_key_s_repeat_is_its_own(api: ApiServer, tenant: Tenant) -> None:
    file_id = tenant.upload()
    first = tenant.create(file_id).json()["id"]
    with api.tenant(tenant.project_id) as colleague:
        assert colleague.create(file_id, headers={"x-stainless-retry-count": "1"}).json()["id"] != first


def test_an_idempotency_key_answers_the_first_batch_or_409(tenant: Tenant) -> None:
    file_id, key = tenant.upload(), {"idempotency-key": "job-7"}
    first = tenant.create(file_id, headers=key).json()
    assert tenant.create(file_id, headers=key).json()["id"] == first["id"]
    answer = tenant.create(file_id, headers=key, priority=5)
    refused(answer, 409, code="idempotency_key_reused")
    assert answer.headers["x-should-retry"] == "false"
    assert len(tenant.http.get("/v1/batches").json()["data"]) == 1


def test_an_idempotency_key_belongs_to_its_project(tenant: Tenant, stranger: Tenant) -> None:
    key = {"idempotency-key": "job-7"}
    first = tenant.create(headers=key).json()["id"]
    assert stranger.create(headers=key).json()["id"] != first


@pytest.mark.parametrize("key", ["", "x" * 256, "with space"])
def test_an_unusable_idempotency_key_is_400(tenant: Tenant, key: str) -> None:
    refused(tenant.create(headers={"idempotency-key": key}), 400)


@pytest.mark.parametrize("headers", [{"idempotency-key": "race"}, {"x-stainless-retry-count": "1"}], ids=["key", "repeat"])
def test_racing_twins_make_one_batch(tenant: Tenant, headers: dict[str, str]) -> None:
    file_id = tenant.upload()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: tenant.create(file_id, headers=headers), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_creation_and_deletion_of_its_input_never_both_succeed(tenant: Tenant) -> None:
    for _ in range(10):
        file_id = tenant.upload()
        with ThreadPoolExecutor(2) as pool:
            created = pool.submit(tenant.create, file_id)
            deleted = pool.submit(tenant.http.delete, f"/v1/files/{file_id}")
            outcome = created.result().status_code, deleted.result().status_code
        assert outcome in {(200, 409), (404, 200)}


# --- reading --------------------------------------------------------------------------------------------------------------------


def test_a_create_promises_validation_in_the_same_transaction(api: ApiServer, tenant: Tenant) -> None:
    with api.services.database.begin() as uow:
        before = uow.outbox.open_items()
    tenant.create()
    with api.services.database.begin() as uow:
        assert uow.outbox.open_items() == before + 1


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=batch_unknown", "after=%00"])
def test_a_listing_refuses_bad_parameters(tenant: Tenant, query: str) -> None:
    refused(tenant.http.get(f"/v1/batches?{query}"), 400, param=query.split("=")[0])


def commit_results(api: ApiServer, batch_id: str, numbers: list[int]) -> None:
    """Delivers lines the way a worker does: a segment, then one transaction."""
    outcomes = [LineOutcome(batch_id, n, None, f"line-{n}", Outcome.SUCCEEDED, 200, {"text": f"answer {n}"}) for n in numbers]
    lines = [encode_result(outcome) for outcome in outcomes]
    info = api.services.blobs.put(f"segments/{batch_id}/{numbers[0]}.jsonl", b"".join(lines))
    placed, offset = [], 0
    for outcome, line in zip(outcomes, lines, strict=True):
        placed.append((outcome, offset, len(line)))
        offset += len(line)
    with api.services.database.begin() as uow:
        batch = uow.batches.load(batch_id, lock=True)
        if batch.status is BatchStatus.VALIDATING:
            uow.batches.save(batch.to(BatchStatus.IN_PROGRESS, uow.now, total=100, model="m"))
        uow.lines.stage(batch_id, [StagedLine(n, 0, 1, f"line-{n}") for n in sorted(numbers)])
        commit_no = uow.batches.count(batch_id, completed=len(numbers), failed=0, usage=outcomes[0].usage)
        uow.results.add(Segment(info.key, batch_id, info.bytes, info.sha256 or ""), placed, commit_no)


def test_results_while_running_come_once_in_commit_order(api: ApiServer, tenant: Tenant) -> None:
    batch_id = tenant.create().json()["id"]
    url = f"/v1/batches/{batch_id}/results"
    assert tenant.http.get(url).json() == {"object": "list", "data": [], "cursor": "0", "has_more": False}
    for numbers in ([5, 9], [1, 2, 3], [7]):
        commit_results(api, batch_id, numbers)
    seen, cursor, more = [], "0", True
    while more:
        page = tenant.http.get(url, params={"after": cursor, "limit": 2}).json()
        seen += [line["custom_id"] for line in page["data"]]
        cursor, more = page["cursor"], page["has_more"]
    assert seen == [f"line-{n}" for n in (5, 9, 1, 2, 3, 7)]
    commit_results(api, batch_id, [4])
    assert [line["response"]["body"]["text"] for line in tenant.http.get(url, params={"after": cursor}).json()["data"]] == ["answer 4"]


def test_results_as_json_lines(api: ApiServer, tenant: Tenant) -> None:
    batch_id = tenant.create().json()["id"]
    commit_results(api, batch_id, [2, 1])
    answer = tenant.http.get(f"/v1/batches/{batch_id}/results", headers={"accept": "application/jsonl"})
    assert [json.loads(line)["custom_id"] for line in answer.text.splitlines()] == ["line-1", "line-2"]
    assert (answer.headers["content-type"], answer.headers["x-has-more"]) == ("application/jsonl", "false")
    assert answer.headers["x-next-cursor"].isdigit()


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=99999999999999999999", "limit=0", "limit=1001"])
def test_results_refuse_bad_cursors(tenant: Tenant, query: str) -> None:
    batch_id = tenant.create().json()["id"]
    refused(tenant.http.get(f"/v1/batches/{batch_id}/results?{query}"), 400, param=query.split("=")[0])


def test_progress_counts_delivered_lines(api: ApiServer, tenant: Tenant) -> None:
    batch_id = tenant.create().json()["id"]
    commit_results(api, batch_id, [1, 2, 3, 4])
    with api.services.database.begin() as uow:
        uow.workers.register("worker-1", host="h", pid=1, device="cpu")
        worker = uow.workers.get("worker-1")
        assert worker is not None
        uow.workers.beat(type(worker)(**(fields_of(worker) | {"model": "m", "tokens_per_second": 123.4})))
    progress = tenant.http.get(f"/v1/batches/{batch_id}").json()["progress"]
    assert (progress["lines_done"], progress["tokens_per_second"]) == (4, 123.4)
    assert progress["eta_seconds"] >= 0


def fields_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_cost_follows_the_ledger(api: ApiServer, tenant: Tenant) -> None:
    batch_id = tenant.create().json()["id"]
    url = f"/v1/batches/{batch_id}"
    empty = tenant.http.get(f"{url}/cost").json()
    assert (empty["amount"], empty["final"], empty["meters"], empty["lines"]["billed"]) == ("0", False, [], 0)
    usage = Usage(input_tokens=1000, cached_tokens=400, output_tokens=50)
    rates = Rates(input=20_000_000, cached_input=10_000_000, output=60_000_000)
    with api.services.database.begin() as uow:
        outcome = LineOutcome(batch_id, 1, None, "line-1", Outcome.SUCCEEDED, 200, {}, usage=usage)
        uow.ledger.post([charge(outcome, project_id=tenant.project_id, model="m", rates=rates, price_version=1)])
        uow.batches.save(uow.batches.load(batch_id, lock=True).evolve(total=1))
        uow.batches.count(batch_id, completed=1, failed=0, usage=usage)
    bill = tenant.http.get(f"{url}/cost").json()
    # 600 x $0.02 + 400 x $0.01 + 50 x $0.06, each per million tokens
    assert (bill["amount"], bill["lines"]["billed"]) == ("0.000019", 1)
    assert {meter["meter"]: (meter["quantity"], meter["amount"]) for meter in bill["meters"]} == {
        "input": (600, "0.000012"),
        "cached_input": (400, "0.000004"),
        "output": (50, "0.000003"),
    }
    assert tenant.http.get(url).json()["cost"] == {"amount": "0.000019", "currency": "usd", "final": False}


def test_a_view_sees_the_next_commit_at_once_and_a_correction_soon(api: ApiServer, tenant: Tenant) -> None:
    batch_id = tenant.create().json()["id"]
    now = [0.0]
    views = BatchViews(clock=lambda: now[0])
    outcomes = [LineOutcome(batch_id, n, None, f"{n}", Outcome.SUCCEEDED, 200, {}, usage=Usage(input_tokens=10**6)) for n in (1, 2)]
    charges = [charge(o, project_id=tenant.project_id, model="m", rates=Rates(10**9, 0, 0), price_version=1) for o in outcomes]

    def amount() -> str:
        return views.get(api.services.database, tenant.project_id, batch_id).amount

    for line, expected in enumerate(("1", "2")):
        with api.services.database.begin() as uow:
            uow.ledger.post([charges[line]])
            uow.batches.save(uow.batches.load(batch_id, lock=True).evolve(total=2))
            uow.batches.count(batch_id, completed=1, failed=0, usage=outcomes[line].usage)
        assert amount() == expected
    with api.services.database.begin() as uow:
        uow.ledger.post([reversal(charges[0])])
    now[0] += KEEP_SECONDS + 1
    assert amount() == "1"


def test_a_retry_of_an_open_batch_is_409(tenant: Tenant) -> None:
    batch_id = tenant.create().json()["id"]
    refused(tenant.http.post(f"/v1/batches/{batch_id}/retry"), 409)
