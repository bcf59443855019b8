"""What Prometheus reads: the queue, slots, requests, streams, disk, notices, and how fast runs train.

What the database knows is read when somebody asks, the rest is counted as it happens.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from sqlalchemy import func, select

import kdscale
from kdscale.service.database.connection import Database
from kdscale.service.database.runs import Runs
from kdscale.service.database.schema import RUNS
from kdscale.service.notices.outbox import STATES as NOTICE_STATES
from kdscale.service.notices.outbox import Outbox
from kdscale.service.operations.metric_table import METRICS
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import ACTIVE, STATES

CONTENT_TYPE = CONTENT_TYPE_LATEST
_log = logging.getLogger(__name__)


_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STEP_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServiceMetrics:
    """The metrics of one application, in a registry of its own. `state` is its `app.state`."""

    def __init__(self, state: Any, clock: Callable[[], float] = time.time):
        self._registry, self._clock = CollectorRegistry(), clock
        self._seconds = self._histogram("kdscale_request_seconds", _REQUEST_BUCKETS)
        self._requests = Counter(
            "kdscale_requests_total", METRICS["kdscale_requests_total"].help,
            METRICS["kdscale_requests_total"].labels, registry=self._registry,
        )  # fmt: skip
        self._steps = self._histogram("kdscale_scheduler_step_seconds", _STEP_BUCKETS)
        self._state = _StateNow(state, clock)
        self._registry.register(self._state)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        row = METRICS[name]
        return Histogram(name, row.help, row.labels, buckets=buckets, registry=self._registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def scheduler_step(self, seconds: float) -> None:
        """Count a step of the scheduler that ended now."""
        self._steps.observe(seconds)
        self._state.last_step = self._clock()

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)


class _StateNow(Collector):
    """What is read from the database and the disk when somebody asks."""

    def __init__(self, state: Any, clock: Callable[[], float]):
        self._state, self._clock = state, clock
        self.last_step = 0.0

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All gauges."""
        settings: ServiceSettings = self._state.settings
        yield _gauge("kdscale_build_info", {(kdscale.__version__,): 1})
        yield _gauge("kdscale_scheduler_last_step_timestamp_seconds", {(): self.last_step})
        yield _gauge("kdscale_event_streams_open", {(): getattr(self._state, "open_streams", 0)})
        yield _gauge("kdscale_disk_free_bytes", {(): shutil.disk_usage(settings.folder).free})
        failed = 0
        try:
            yield from self._of_database(self._state.database)
        except Exception:  # noqa: BLE001 (a database that is down is what whoever asks wants to see)
            _log.exception("the database could not be asked for metrics")
            failed = 1
        yield _gauge("kdscale_collect_failed", {(): failed})

    def _of_database(self, database: Database) -> list[Metric]:
        runs = Runs(database)
        counts = runs.counts()
        oldest, held = _queue_and_slots(database)
        told = Outbox(database).counts()
        training = [run for run in runs.in_states({"running"}, origin=None) if run.progress]
        return [
            _gauge("kdscale_runs", {(state,): counts.get(state, 0) for state in STATES}),
            _gauge("kdscale_queue_oldest_seconds", {(): max(0.0, self._clock() - oldest) if oldest else 0.0}),
            _gauge("kdscale_slots", self._slots(held)),
            _gauge("kdscale_notices", {(state,): told.get(state, 0) for state in NOTICE_STATES}),
            _gauge("kdscale_run_step", _figures({run.id: run.progress.get("step") for run in training})),
            _gauge(
                "kdscale_run_tokens_per_second",
                _figures({run.id: run.progress.get("tokens_per_second") for run in training}),
            ),
        ]

    def _slots(self, held: int) -> dict[tuple[str, ...], float]:
        machine = getattr(self._state.scheduler, "machine", None)
        found: dict[tuple[str, ...], float] = {("used",): float(held)}
        if machine is not None:
            found[("free",)] = float(max(0, machine.slots - held))
        return found


def _queue_and_slots(database: Database) -> tuple[float | None, int]:
    """Since when the oldest run waits, and how many slots runs of this machine hold."""
    with database.read() as connection:
        oldest = connection.execute(select(func.min(RUNS.c.queued)).where(RUNS.c.state == "queued")).scalar()
        active = select(RUNS.c.slots, RUNS.c.target).where(RUNS.c.state.in_(sorted(ACTIVE)), RUNS.c.origin == "service")
        held = sum(row.slots for row in connection.execute(active) if row.target.get("engine", "local") == "local")
    return oldest, held


def _figures(values: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    return {(name,): float(value) for name, value in values.items() if isinstance(value, int | float)}


def _gauge(name: str, values: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    row = METRICS[name]
    family = GaugeMetricFamily(name, row.help, labels=row.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
