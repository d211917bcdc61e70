"""Prometheus metrics of the three processes. Labels are few and bounded: models, states, kinds, routes; never ids.

Counters belong to one process. The gauges of the backlog are read from the database when they are asked for, so every control process
tells the same: take their maximum.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from service.billing.reports import wasted
from service.domain.line import LineOutcome, Outcome
from service.errors import LongdraftError

if TYPE_CHECKING:
    from service.ports import Backlog, Database, InferenceRunner
    from service.usecases.sweep import Swept

WORKER_ALIVE = timedelta(minutes=1)
API_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
ITEM_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 1800)


class Metrics:
    """What one process counts. `text()` is Prometheus's exposition of it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class ApiMetrics(Metrics):
    """Requests by route."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = Histogram(
            "longdraft_api_request_seconds",
            "Time from a request's arrival to the end of its answer.",
            ["method", "route", "status"],
            buckets=API_BUCKETS,
            registry=self.registry,
        )

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route`: the path's template, `none` where no route matched; `status` 0: the client left before there was one."""
        self._requests.labels(method, route, str(status)).observe(seconds)


class ControlMetrics(Metrics):
    """What the control process did, and the backlog as the database knows it."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._sweeps = Counter("longdraft_sweeps", "Sweeps, by result.", ["result"], registry=self.registry)
        self._reclaimed = Counter("longdraft_leases_reclaimed", "Leases that ran out and were taken back.", registry=self.registry)
        self._expired = Counter("longdraft_batches_expired", "Batches whose window ended before their work.", registry=self.registry)
        self._items = Histogram(
            "longdraft_control_item_seconds",
            "Time that a promise of the outbox took, by kind and result.",
            ["kind", "result"],
            buckets=ITEM_BUCKETS,
            registry=self.registry,
        )
        self._removed = Counter("longdraft_objects_removed", "Objects that the janitor removed.", registry=self.registry)
        self.registry.register(_BacklogCollector(database))

    def swept(self, found: Swept) -> None:
        self._sweeps.labels("skipped" if found.skipped else "done").inc()
        self._reclaimed.inc(found.taken_back)
        self._expired.inc(found.expired)

    def sweep_failed(self) -> None:
        self._sweeps.labels("failed").inc()

    def item(self, kind: str, result: str, seconds: float) -> None:
        """`result`: done, lost (someone else has it), retried, or failed (a bug; retried, too)."""
        self._items.labels(kind, result).observe(seconds)

    def removed(self, objects: int) -> None:
        self._removed.inc(objects)


class _BacklogCollector:
    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> list[Metric]:
        return []  # registering must not ask the database

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("longdraft_database_up", "Whether the database answered this scrape.")
        try:
            with self._database.begin() as uow:
                backlog = uow.monitor.backlog(WORKER_ALIVE)
        except LongdraftError:
            up.add_metric([], 0)
        else:
            up.add_metric([], 1)
            yield from _backlog(backlog)
        yield up


def _backlog(backlog: Backlog) -> Iterator[Metric]:
    groups = GaugeMetricFamily("longdraft_groups", "Open groups of up to 64 lines: due, leased, or waiting.", labels=["model", "state"])
    for (model, state), count in backlog.groups.items():
        groups.add_metric([model, state], count)
    batches = GaugeMetricFamily("longdraft_batches", "Batches that have not ended, by status.", labels=["status"])
    for status, count in backlog.batches.items():
        batches.add_metric([status], count)
    items = GaugeMetricFamily("longdraft_outbox_items", "Promises of the outbox that are not kept yet.", labels=["kind"])
    lag = GaugeMetricFamily("longdraft_outbox_lag_seconds", "How late the oldest promise of a kind is.", labels=["kind"])
    for kind, found in backlog.outbox.items():
        items.add_metric([kind.value], found.open)
        lag.add_metric([kind.value], found.seconds)
    live = GaugeMetricFamily("longdraft_live_workers", "Workers heard of within a minute.")
    live.add_metric([], backlog.workers)
    refused = GaugeMetricFamily("longdraft_model_refused", "1 for a model whose last load was refused.", labels=["model"])
    for model in backlog.refused:
        refused.add_metric([model], 1)
    yield from (groups, batches, items, lag, live, refused)


class Holder(Protocol):
    """What a worker's metrics ask of its GroupRunner."""

    @property
    def held(self) -> int: ...


class WorkerMetrics(Metrics):
    """What a worker delivered, and where its device's time goes."""

    def __init__(self, runner: InferenceRunner, holder: Holder) -> None:
        super().__init__()
        self._lines = Counter("longdraft_lines", "Lines whose outcome was committed.", ["outcome"], registry=self.registry)
        self._tokens = Counter(
            "longdraft_tokens",
            "Tokens of committed lines: prompt and cached, generated; drafted, verified, accepted; wasted.",
            ["kind"],
            registry=self.registry,
        )
        for outcome in Outcome:
            self._lines.labels(outcome.value)
        self.registry.register(_RunnerCollector(runner, holder))

    def delivered(self, outcomes: Sequence[LineOutcome]) -> None:
        """Counts what was just committed."""
        for outcome in outcomes:
            self._lines.labels(outcome.outcome.value).inc()
            work = outcome.work
            for kind in ("prompt", "cached", "generated", "drafted", "verified", "accepted"):
                self._tokens.labels(kind).inc(getattr(work, kind))
            self._tokens.labels("wasted").inc(wasted(work))


class _RunnerCollector:
    def __init__(self, runner: InferenceRunner, holder: Holder) -> None:
        self._runner = runner
        self._holder = holder
        self._started = time.monotonic_ns()
        self._before = runner.stats()

    def collect(self) -> Iterator[Metric]:
        now, before = self._runner.stats(), self._before
        wall_ns = time.monotonic_ns() - self._started
        spent = {name: getattr(now, f"{name}_ns") - getattr(before, f"{name}_ns") for name in ("busy", "load", "profile")}
        seconds = CounterMetricFamily("longdraft_device_seconds", "The device's wall time: busy, load, profile, idle.", labels=["kind"])
        for kind, nanoseconds in {**spent, "idle": max(0, wall_ns - sum(spent.values()))}.items():
            seconds.add_metric([kind], nanoseconds * 1e-9)
        yield seconds
        yield CounterMetricFamily(
            "longdraft_engine_steps", "Steps of the engine; busy seconds by steps is the step time.", value=now.steps - before.steps
        )
        for name, text, value in (
            ("longdraft_acceptance_length", "Tokens sampled per line and step; 1 without speculation.", now.acceptance_length),
            ("longdraft_tokens_per_second", "Tokens generated per second, over about ten seconds.", now.tokens_per_second),
            ("longdraft_kv_usage_ratio", "Share of the KV cache that running lines hold, 0 to 1.", now.kv_usage),
            ("longdraft_running_lines", "Lines in the engine that have their part of the KV cache.", now.running),
            ("longdraft_waiting_lines", "Lines in the engine that wait for room.", now.waiting),
            ("longdraft_held_groups", "Groups that this worker has on lease.", self._holder.held),
        ):
            yield GaugeMetricFamily(name, text, value=value)
