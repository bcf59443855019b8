"""Every metric of the service, one row each; docs/reference/service-metrics.md is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricRow:
    """A metric: its type, what it says, and its labels."""

    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, MetricRow] = {
    "kdscale_build_info": MetricRow("gauge", "Always 1; the label has the version.", ("version",)),
    "kdscale_runs": MetricRow("gauge", "Runs in each state.", ("state",)),
    "kdscale_queue_oldest_seconds": MetricRow("gauge", "For how long the longest waiting run has been in the queue."),
    "kdscale_slots": MetricRow("gauge", "Slots of this machine that runs hold, and that are free.", ("use",)),
    "kdscale_run_step": MetricRow("gauge", "Optimiser step of a run that trains now.", ("run",)),
    "kdscale_run_tokens_per_second": MetricRow("gauge", "Training tokens a second of a run that trains now.", ("run",)),
    "kdscale_disk_free_bytes": MetricRow("gauge", "Free bytes of the file system of the home folder."),
    "kdscale_event_streams_open": MetricRow("gauge", "Event streams that clients keep open."),
    "kdscale_notices": MetricRow("gauge", "Notices that wait, were sent, and were given up.", ("state",)),
    "kdscale_collect_failed": MetricRow("gauge", "1 when the database could not be asked for these figures."),
    "kdscale_scheduler_step_seconds": MetricRow("histogram", "Seconds of one step of the scheduler."),
    "kdscale_scheduler_last_step_timestamp_seconds": MetricRow(
        "gauge", "When the scheduler's last step ended, in seconds since 1970; 0 before the first."
    ),
    "kdscale_request_seconds": MetricRow(
        "histogram", "Seconds from a request to the beginning of its answer.", ("method", "route")
    ),
    "kdscale_requests_total": MetricRow("counter", "Requests that were answered.", ("method", "route", "status")),
}
