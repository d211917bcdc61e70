"""Costs and usage of three projects over several days, through the stock SDK."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import orjson
import pytest
from openai import BadRequestError, OpenAI

from service.adapters.blobs_local import LocalBlobStore
from service.adapters.memory import MemoryTaskQueue
from service.bootstrap import Services
from service.config import load_settings
from service.domain.usage import Usage
from service.usecases.corrections import reverse_charge
from service.usecases.keys import create_key
from tests.integration.api_server import serve
from tests.integration.seed import Seed

FIRST = datetime(2026, 3, 1, tzinfo=UTC)
START = int(FIRST.timestamp())
DAY = 86_400
RATES = {"input": 20_000_000, "cached": 10_000_000, "output": 60_000_000}


@dataclass
class Finance:
    """A server with charges from 1 to 4 March, and a client of the project `search`."""

    seed: Seed
    url: str
    secret: str

    @property
    def usage(self) -> Any:
        client = OpenAI(
            base_url=f"{self.url}/v1", api_key=self.secret, admin_api_key=self.secret, max_retries=0, _strict_response_validation=True
        )
        return client.admin.organization.usage

    def get(self, path: str, **params: Any) -> httpx.Response:
        return httpx.get(f"{self.url}/v1/organization/{path}", params=params, headers={"authorization": f"Bearer {self.secret}"})


@pytest.fixture
def finance(database: Any, owner_url: str, tmp_path: Any) -> Iterator[Finance]:
    seed = Seed(database, owner_url)
    for day in range(4):
        at = FIRST + timedelta(days=day, hours=23, minutes=59)
        if day != 2:
            seed.deliver("search", [Usage(100 * (day + 1), 40, 10)] * 2, at=at)
        seed.deliver("ads", [Usage(1000, 0, 7)], at=at)
    seed.deliver("search", [Usage(11, 0, 13)], model="gemma3-270m", at=FIRST + timedelta(hours=1))
    settings = load_settings({}, data_dir=tmp_path)
    _, secret = create_key(database, "search", "finance", pepper=settings.key_pepper, scopes=("read",))
    with serve(Services(settings, database, LocalBlobStore(tmp_path / "blobs"), MemoryTaskQueue())) as server:
        yield Finance(seed, server.url, secret)


def price(*usages: Usage) -> Decimal:
    femto = sum(
        (u.input_tokens - u.cached_tokens) * RATES["input"] + u.cached_tokens * RATES["cached"] + u.output_tokens * RATES["output"]
        for u in usages
    )
    return Decimal(femto).scaleb(-15)


def test_costs_by_day(finance: Finance) -> None:
    page = finance.usage.costs(start_time=START, end_time=START + 4 * DAY)
    assert [(bucket.start_time, bucket.end_time) for bucket in page.data] == [(START + n * DAY, START + (n + 1) * DAY) for n in range(4)]
    values = [[Decimal(str(result.amount.value)) for result in bucket.results] for bucket in page.data]
    assert values[0] == [price(Usage(100, 40, 10), Usage(100, 40, 10), Usage(11, 0, 13))]
    assert values[2] == []
    assert values[3] == [price(*[Usage(400, 40, 10)] * 2)]
    assert (page.has_more, page.next_page) == (False, None)


def test_amounts_are_written_exactly(finance: Finance) -> None:
    raw = finance.get("costs", start_time=START, end_time=START + DAY).content
    assert price(Usage(100, 40, 10), Usage(100, 40, 10), Usage(11, 0, 13)) == Decimal("0.0000054")
    assert b'"value":0.0000054,' in raw


def test_line_items_and_projects(finance: Finance) -> None:
    page = finance.usage.costs(start_time=START, end_time=START + DAY, group_by=["line_item", "project_id"])
    items = {result.line_item: Decimal(str(result.amount.value)) for result in page.data[0].results}
    assert items == {
        "smollm2-135m, input": Decimal(120 * RATES["input"]).scaleb(-15),
        "smollm2-135m, cached input": Decimal(80 * RATES["cached"]).scaleb(-15),
        "smollm2-135m, output": Decimal(20 * RATES["output"]).scaleb(-15),
        "gemma3-270m, input": Decimal(11 * RATES["input"]).scaleb(-15),
        "gemma3-270m, output": Decimal(13 * RATES["output"]).scaleb(-15),
    }
    assert {result.project_id for result in page.data[0].results} == {finance.seed.project("search").id}
    only = finance.usage.costs(start_time=START, end_time=START + DAY, line_items=["gemma3-270m, output"])
    assert [Decimal(str(result.amount.value)) for result in only.data[0].results] == [items["gemma3-270m, output"]]


def test_pages_go_on_where_the_one_before_ended(finance: Finance) -> None:
    seen, token = [], {}
    while True:
        page = finance.usage.costs(start_time=START, end_time=START + 4 * DAY, limit=3, **token)
        seen += [bucket.start_time for bucket in page.data]
        assert len(page.data) <= 3
        if not page.has_more:
            break
        token = {"page": page.next_page}
    assert seen == [START + n * DAY for n in range(4)]


def test_usage_by_model(finance: Finance) -> None:
    page = finance.usage.completions(start_time=START, end_time=START + DAY, group_by=["model", "batch"])
    found = {result.model: result for result in page.data[0].results}
    smol = found["smollm2-135m"]
    assert (smol.input_tokens, smol.input_cached_tokens, smol.output_tokens, smol.num_model_requests) == (200, 80, 20, 2)
    assert (found["gemma3-270m"].output_tokens, found["gemma3-270m"].batch) == (13, True)
    hours = finance.usage.completions(start_time=START, end_time=START + DAY, bucket_width="1h", models=["gemma3-270m"])
    assert [len(bucket.results) for bucket in hours.data] == [0, 1] + [0] * 22
    assert all(bucket.results == [] for bucket in finance.usage.completions(start_time=START, batch=False).data)


def test_other_projects_are_not_seen(finance: Finance) -> None:
    page = finance.usage.costs(start_time=START, end_time=START + DAY, project_ids=[finance.seed.project("ads").id])
    assert page.data[0].results == []


def test_reversals_are_taken_off(finance: Finance) -> None:
    batch = finance.seed.deliver("search", [Usage(5, 0, 5)] * 3)
    reverse_charge(finance.seed.database, batch, 2)
    page = finance.usage.completions(start_time=int(datetime.now(UTC).timestamp()) - 60)
    assert page.data[-1].results[0].num_model_requests == 2
    assert page.data[-1].results[0].input_tokens == 10


@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("costs", {}, "start_time"),
        ("costs", {"start_time": -1}, "start_time"),
        ("costs", {"start_time": 10**15}, "start_time"),
        ("costs", {"start_time": START, "end_time": START}, "end_time"),
        ("costs", {"start_time": START, "bucket_width": "1h"}, "bucket_width"),
        ("costs", {"start_time": START, "limit": 181}, "limit"),
        ("costs", {"start_time": START, "group_by": "model"}, "group_by"),
        ("costs", {"start_time": START, "group_by[]": "user_id"}, "group_by"),
        ("costs", {"start_time": START, "page": "page_1"}, "page"),
        ("costs", {"start_time": START, "page": "x"}, "page"),
        ("usage/completions", {"start_time": START, "limit": 32}, "limit"),
        ("usage/completions", {"start_time": START, "user_ids": "u"}, "user_ids"),
    ],
)
def test_bad_questions(finance: Finance, path: str, params: dict[str, Any], param: str) -> None:
    answer = finance.get(path, **params)
    assert answer.status_code == 400, answer.text
    assert orjson.loads(answer.content)["error"]["param"] == param


def test_the_sdk_raises_its_own_error(finance: Finance) -> None:
    with pytest.raises(BadRequestError):
        finance.usage.costs(start_time=START, group_by=["user_id"])
