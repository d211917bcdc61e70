"""The dashboard and the alerts speak of metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.adapters.standin import StandinRunner
from service.config import load_settings
from service.domain.line import LineOutcome, Outcome
from service.metrics import ApiMetrics, ControlMetrics, WorkerMetrics, _backlog
from service.ports import Backlog, OutboxKind, OutboxLag
from service.usecases.sweep import Swept

INFRA = Path(__file__).parents[3] / "infra"
DASHBOARD = json.loads((INFRA / "grafana" / "longdraft.json").read_text())
ALERTS = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())
FULL = Backlog({("m", "due"): 1}, {"in_progress": 1}, {OutboxKind.WAKE: OutboxLag(1, 2.0)}, 1, ["m"])


class Holder:
    held = 1


class Fixed:
    def collect(self) -> Iterator[Any]:
        yield from _backlog(FULL)


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every sample's name -> its labels, from registries of all three processes that have counted something."""
    settings = load_settings({}, data_dir=tmp_path_factory.mktemp("data"), runner="standin")
    api, worker = ApiMetrics(), WorkerMetrics(StandinRunner(settings), Holder())
    api.request("GET", "/v1/files", 200, 0.1)
    worker.delivered([LineOutcome("batch_1", 1, 1, "c", Outcome.SUCCEEDED)])
    from service.adapters.unit_of_work import PostgresDatabase

    away = PostgresDatabase(f"postgresql://nobody@/nothing?host={settings.data_dir}")
    control = ControlMetrics(away)
    control.swept(Swept())
    control.item("wake", "done", 0.1)
    backlog = CollectorRegistry()
    backlog.register(Fixed())  # type: ignore[arg-type]  # a collector is what has `collect`
    found: dict[str, set[str]] = {}
    for registry in (api.registry, worker.registry, control.registry, backlog):
        for family in registry.collect():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> list[Any]:
    panels = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    alerts = [(rule["alert"], rule["expr"]) for group in ALERTS["groups"] for rule in group["rules"]]
    return [pytest.param(expr, id=f"{name}-{number}") for number, (name, expr) in enumerate([*panels, *alerts])]


@pytest.mark.parametrize("expr", expressions())
def test_every_metric_and_label_exists(expr: str, metrics: dict[str, set[str]]) -> None:
    used = re.findall(r"(longdraft_\w+)(?:\{([^}]*(?:\{[^}]*\}[^}]*)*)\})?", expr)
    assert used
    known: set[str] = {"instance", "job", "le"}
    for name, selector in used:
        assert name in metrics, name
        known |= metrics[name]
        for label in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", selector):
            assert label in metrics[name], f"{name} has no label {label}"
    for grouped in re.findall(r"by \(([^)]*)\)", expr):
        assert {label.strip() for label in grouped.split(",")} <= known
    assert expr.count("(") == expr.count(")")


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert DASHBOARD["uid"]
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["datasource"]["uid"] == "${datasource}" and panel["description"] for panel in DASHBOARD["panels"])


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
            assert set(rule["annotations"]) == {"summary", "description"}
            assert rule["labels"]["severity"] in ("warning", "critical")
            for label in re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])):
                assert f"by ({label}" in rule["expr"], "a label that the expression drops is empty in the message"


def test_every_metric_of_ours_is_shown_somewhere(metrics: dict[str, set[str]]) -> None:
    texts = json.dumps(DASHBOARD) + json.dumps(ALERTS)
    ours = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in metrics if name.startswith("longdraft_")}
    unseen = {name for name in ours if name not in texts} - {"longdraft_outbox_items"}
    assert not {name for name in unseen if not name.endswith("_created")}, unseen
