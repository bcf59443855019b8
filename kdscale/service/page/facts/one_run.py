"""What the page of a run shows: where it is, its stages, its curves, what happened, and what it has made."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from starlette.datastructures import State

from kdscale.config.load import dump_yaml
from kdscale.errors import KdscaleError
from kdscale.runs.folder import STUDENT
from kdscale.runs.metrics_log import is_figure
from kdscale.service.access.identity import Actor
from kdscale.service.api.files.folder import files_under
from kdscale.service.api.runs import stages_of_run
from kdscale.service.api.schemas import StageState
from kdscale.service.api.streaming.logs import last_lines
from kdscale.service.database.events import Event
from kdscale.service.database.runs import Run
from kdscale.service.ids import is_run_id
from kdscale.service.page.actions import actions_for
from kdscale.service.page.curves import Curves, curves_of_run
from kdscale.service.page.facts.config_changes import changes, command_line
from kdscale.service.page.facts.run_rows import format_speed, number, share, stage
from kdscale.service.page.facts.tiles import Tile
from kdscale.service.redaction import redacted, redacted_text
from kdscale.service.states import ACTIVE, FINAL
from kdscale.units import compact_duration, format_number

_EVENTS, _FACTS, _FILES = 60, 4, 300  # that are shown: the latest events, facts of one stage, files
_LINES, _LOG_BYTES, _LOG_SECONDS = 200, 64 << 10, 10.0  # of the log
_FIGURES = ("perplexity", "loss", "since", "error")  # of events, in this order
_LONGEST, _FACT_LENGTH = 300, 70  # characters of an event or a reason, and of a fact


@dataclass(frozen=True)
class Stage:
    """One stage in the strip. `started` is in seconds since 1970."""

    name: str
    state: str
    seconds: float
    started: float | None
    facts: list[str]


@dataclass(frozen=True)
class Happening:
    """An event in words."""

    time: float
    text: str


def live(state: State, run: Run, actor: Actor) -> dict[str, Any]:
    """What changes while a run goes on."""
    now = time.time()
    curves = curves_of_run(state, run.folder)
    return {
        "run": run, "reason": redacted_text(run.reason), "ended": run.state in FINAL,
        "actions": actions_for(run, actor), "tiles": tiles(run, curves, now),
        "stages": [_stage(each, now) for each in stages_of_run(run)],
        "charts": curves.charts(), "x_title": curves.x_title, "log": printed(state, run, now),
        "has_student": (run.folder / STUDENT.path / "config.json").is_file(),
        "has_report": (run.folder / "report" / "report.html").is_file(),
        "events": [happening(event) for event in reversed(state.events.latest(run.id, _EVENTS))],
    }  # fmt: skip


def unchanging(run: Run) -> dict[str, Any]:
    """What stays: the config."""
    config = redacted(run.config)
    # the config of a run that was made from another's has its changes in it already
    named = ("", []) if is_run_id(run.config_name) or run.parent else (run.config_name, run.overrides)
    return {
        "differences": changes(config), "config_text": dump_yaml(config),
        "command": command_line("run", *named), **files(run),
    }  # fmt: skip


def files(run: Run) -> dict[str, Any]:
    """The run's files, the first few hundred."""
    found = files_under(run.folder) if run.folder.is_dir() else []
    return {"files": found[:_FILES], "more_files": len(found) > _FILES}


def printed(state: State, run: Run, now: float) -> str:
    """The end of a run's log; that of a run elsewhere is asked for at most every few seconds."""
    if run.target.get("engine", "local") == "local":
        return last_lines(state, run, _LINES, _LOG_BYTES)
    kept: dict[str, tuple[float, str]] = getattr(state, "page_logs", None) or {}
    if run.id not in kept or now - kept[run.id][0] > _LOG_SECONDS:
        try:
            text = last_lines(state, run, _LINES, _LOG_BYTES)
        except KdscaleError as error:
            text = f"It cannot be read now: {error}"
        fresh = {name: one for name, one in kept.items() if now - one[0] <= _LOG_SECONDS}
        kept = state.page_logs = {**fresh, run.id: (now, text)}
    return kept[run.id][1]


def tiles(run: Run, curves: Curves, now: float) -> list[Tile]:
    """The figures at the top."""
    progress, ended = run.progress, run.state in FINAL
    found = []
    if not ended and (done := share(run)) is not None:
        left = number(progress, "seconds_left")
        found.append(Tile("Progress", f"{done:.0%}", f"{compact_duration(left)} left" if left else "", done))
    if not ended and stage(run):
        found.append(Tile("Stage", stage(run)))
    step, steps = number(progress, "step"), number(progress, "steps")
    if step is not None:
        found.append(Tile("Step", f"{step:,.0f}", f"of {steps:,.0f}" if steps else ""))
    if not ended and (speed := number(progress, "tokens_per_second")) is not None:
        found.append(Tile("Tokens/s", format_speed(speed)))
    if (loss := number(progress, "loss")) is not None:
        found.append(Tile("Training loss", format_number(loss)))
    if curves.validation:
        found.append(Tile(f"Held-out {curves.validation_measure}", format_number(curves.validation[-1][1])))
    if run.started is not None and (ended or run.state in ACTIVE):
        found.append(Tile("Ran for" if ended else "Running for", compact_duration((run.ended or now) - run.started)))
    elif run.queued is not None and run.state == "queued":
        found.append(Tile("Waiting for", compact_duration(now - run.queued), f"priority {run.priority}"))
    found.append(Tile("Where", str(run.target.get("engine", "local")), _slots(run)))
    if run.attempt > 1:
        found.append(Tile("Starts", str(run.attempt)))
    if ended and run.exit_code:
        found.append(Tile("Exit code", str(run.exit_code)))
    return found


def _slots(run: Run) -> str:
    return ", ".join(run.devices) or f"{run.slots} slot{'s' if run.slots > 1 else ''}"


def _stage(found: StageState, now: float) -> Stage:
    at = _seconds(found.time)
    seconds = found.seconds
    started = at - seconds if at is not None else None  # the time in the file is that of the last change
    if found.state == "running" and at is not None:
        seconds, started = max(0.0, now - at), at
    facts = [_cut(f"{name}: {value}", _FACT_LENGTH) for name, value in list(found.facts.items())[:_FACTS]]
    if found.reason:
        facts.append(_cut(found.reason, _LONGEST))
    name = f"{found.step}: {found.name}" if found.step else found.name
    return Stage(name, found.state, seconds, started, facts)


def _seconds(time_text: str) -> float | None:
    try:
        return datetime.fromisoformat(time_text).timestamp() if time_text else None
    except ValueError:
        return None


def happening(event: Event) -> Happening:
    """An event in words: `running`, `distill done (held-out perplexity: 142.78 → 92.64)`."""
    data = {name: value for name, value in redacted(event.data).items() if value not in (None, "", [], {})}
    if event.type == "state":
        words = [str(data.get("state", ""))]
    elif event.type == "stage":
        words = [str(data[name]) for name in ("step", "stage", "state") if name in data]
    else:
        words = [event.type.replace("_", " ")]
        words += [f"at step {data['step']}"] if "step" in data else []
    facts = data.get("facts") if event.type in ("state", "stage") else {name: data.get(name) for name in _FIGURES}
    shown = [
        f"{name.replace('_', ' ')} {format_number(value) if is_figure(value) else value}"
        for name, value in (facts.items() if isinstance(facts, dict) else ())
        if value is not None
    ]
    text = " ".join(words) + (f": {data['reason']}" if "reason" in data else "")
    return Happening(event.time, _cut(text + (f" ({', '.join(shown)})" if shown else ""), _LONGEST))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
