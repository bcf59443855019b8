"""What is worth a notice, found among the events of runs, and the words that it is told in.

A kind of notice is a row of OCCASIONS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from kdscale.escaping import for_terminal
from kdscale.service.database.events import Event
from kdscale.service.database.runs import Run
from kdscale.service.redaction import redacted_text
from kdscale_launch.job import STOPPED_EXIT_CODE

NoticeKind = Literal["succeeded", "failed", "cancelled", "preempted", "hung", "spike", "removal"]
KINDS: tuple[NoticeKind, ...] = get_args(NoticeKind)
# What an owner is told who did not choose: a run that somebody cancelled surprises nobody who did it.
DEFAULT_KINDS: tuple[NoticeKind, ...] = ("succeeded", "failed", "preempted", "hung", "spike", "removal")
SPIKE_EVENT = "spike"  # written by whoever reads a run's metrics; data: step, loss, limit
HUNG_EVENT = "hung"  # written by the scheduler; data: since


def _state_is(*states: str) -> Callable[[Event], bool]:
    # the first event of a run has no attempt: it may have ended long before the service found it
    return lambda event: event.type == "state" and event.data.get("state") in states and "attempt" in event.data


def _is_preemption(event: Event) -> bool:
    """Whether a run left with everything saved that nobody asked to, or its engine took it back into its own queue.

    A run that tries again after a failure has the code of that failure; None: it was lost.
    """
    code = event.data.get("exit_code", STOPPED_EXIT_CODE)
    return event.type == "state" and event.data.get("state") == "recovering" and code == STOPPED_EXIT_CODE


@dataclass(frozen=True)
class Occasion:
    """A kind of notice: which events are one, and how it is said.

    `sentence` is formatted with `name`. `at_most_every`: seconds in which one run says it once. After `stale_after`
    seconds nobody wants to know it any more.
    """

    happened: Callable[[Event], bool]
    sentence: str
    at_most_every: float = 0.0
    stale_after: float = math.inf


OCCASIONS: Mapping[NoticeKind, Occasion] = {
    "succeeded": Occasion(_state_is("succeeded"), "Run {name} is finished."),
    "failed": Occasion(_state_is("failed"), "Run {name} failed."),
    "cancelled": Occasion(_state_is("cancelled"), "Run {name} was cancelled."),
    "preempted": Occasion(
        _is_preemption, "Run {name} was stopped by its machine; it saved, and goes on when it can.", 3600.0
    ),
    "hung": Occasion(lambda event: event.type == HUNG_EVENT, "Run {name} makes no progress.", 6 * 3600.0, 86_400.0),
    "spike": Occasion(
        lambda event: event.type == SPIKE_EVENT, "The loss of run {name} is out of line.", 3600.0, 86_400.0
    ),
    "removal": Occasion(lambda event: False, "Files of run {name} will be deleted."),  # written by the retention
}
# What of an event's data is told. Everything else stays here: notices leave this machine.
_TOLD = ("reason", "attempt", "step", "loss", "limit", "since", "paths", "deleted_at")


@dataclass(frozen=True)
class Notice:
    """One thing to tell, whoever hears it. `topic` is the same when the same thing of a run is found again."""

    topic: str
    kind: NoticeKind
    run: Run
    time: float
    facts: Mapping[str, Any]


def notice_of(event: Event, run: Run, now: float) -> Notice | None:
    """The notice that an event is worth, if any."""
    for kind, occasion in OCCASIONS.items():
        if occasion.happened(event) and now - event.time <= occasion.stale_after:
            return Notice(f"event-{event.seq}", kind, run, event.time, event.data)
    return None


def subject_of(notice: Notice) -> str:
    """One line, for the subject of a mail."""
    return f"[kdscale] {notice.run.name}: {notice.kind}"


def body_of(notice: Notice, service_url: str | None) -> dict[str, Any]:
    """What a webhook sends, as JSON; texts without the credentials of URLs in them."""
    run = notice.run
    facts = {name: _clean(notice.facts[name]) for name in _TOLD if name in notice.facts}
    if isinstance(facts.get("since"), float):
        facts["since"] = _iso(facts["since"])
    link = {} if service_url is None else {"link": f"{service_url.rstrip('/')}/runs/{run.id}"}
    return {
        "type": f"run.{notice.kind}",
        "timestamp": _iso(notice.time),
        "data": {
            "run": {
                "id": run.id, "name": run.name, "owner": run.owner, "state": run.state, "config": run.config_name,
                "exit_code": run.exit_code, "attempt": run.attempt, "parent": run.parent,
            },
            **facts,
            **link,
        },
    }  # fmt: skip


def text_of(kind: NoticeKind, body: Mapping[str, Any]) -> str:
    """The same for people, for the text of a mail."""
    data = body["data"]
    run = data["run"]
    rows = {
        "run": run["id"], "owner": run["owner"], "state": run["state"], "time": body["timestamp"],
        **({"exit code": run["exit_code"]} if run["exit_code"] is not None else {}),
        **{name.replace("_", " "): value for name, value in data.items() if name != "run" and value not in ("", None)},
    }  # fmt: skip
    lines = [OCCASIONS[kind].sentence.format(name=run["name"]), ""]
    for name, value in rows.items():
        words = "\n".join(f"  {item}" for item in value) if isinstance(value, list) else str(value)
        lines.append(f"{name}:\n{words}" if "\n" in words or isinstance(value, list) else f"{name}: {words}")
    return for_terminal("\n".join(lines)) + "\n"


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return redacted_text(value)[:4000]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    return [_clean(item) for item in value] if isinstance(value, list) else value


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
