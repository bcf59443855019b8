"""What the commands of a service print of its runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from kdscale.cli.tables import STATE_COLOURS, note, table
from kdscale.client import STATES, Run, RunDetail, RunState, Verdict
from kdscale.errors import ConfigError
from kdscale.units import compact_duration, format_count, format_duration, format_size


def check_states(given: Collection[str]) -> list[RunState]:
    """The states that are asked for. Raises ConfigError for a word that is none."""
    if unknown := [word for word in given if word not in STATES]:
        raise ConfigError("--state", expected=f"of {', '.join(STATES)}", got=", ".join(unknown))
    return [state for state in STATES if state in given]


def in_words(run: Run) -> str:
    """`tiny is running: distill 40 %, 3 min 20 s left`; the reason where there is one."""
    doing = f": {told}" if run.state == "running" and (told := progress_in_words(run.progress)) else ""
    return f"{run.name} is {run.state}{doing}" + (f" ({run.reason})" if run.reason else "")


def progress_in_words(progress: Mapping[str, Any]) -> str:
    """`distill 40 %, 3 min 20 s left`; empty before there is any."""
    stage, share, left = progress.get("stage"), progress.get("share"), progress.get("seconds_left")
    if not stage:
        return ""
    done = f" {100 * share:.0f} %" if isinstance(share, int | float) else ""
    return f"{stage}{done}" + (f", {format_duration(left)} left" if isinstance(left, int | float) else "")


def show_runs(runs: Sequence[Run], limit: int) -> None:
    """A line a run, the newest first."""
    if not runs:
        note("no runs", "dim")
        return
    rows = [
        (
            run.id, run.name, _state(run.state), progress_in_words(run.progress) if not run.has_ended else "",
            run.owner, compact_duration((datetime.now(UTC) - run.created).total_seconds()),
        )
        for run in runs[:limit]
    ]  # fmt: skip
    Console().print(table("", ("run", "name", "state", "", "owner", "age"), rows))
    if len(runs) > limit:
        note(f"the newest {limit}; --limit shows more", "dim")


def show_run(run: RunDetail) -> None:
    """One run: its state, its stages, how long they took."""
    Console(soft_wrap=True).print(Text(f"{run.id}  {in_words(run)}", "bold"))
    facts = [
        f"of {run.owner}",
        f"created {run.created:%Y-%m-%d %H:%M} UTC",
        f"start {run.attempt}" if run.attempt else "",
    ]
    facts += [f"exit code {run.exit_code}"] if run.exit_code else []
    facts += [f"made from {run.parent}"] if run.parent else []
    note(" · ".join(facts), "")
    rows = []
    for stage in run.stages:
        told = " · ".join(f"{name} {value}" for name, value in stage.facts.items())
        took = format_duration(stage.seconds) if stage.seconds else ""
        rows.append((stage.name, _state(stage.state), took, told or stage.reason.partition("\n")[0]))
    if rows:
        Console().print(table("", ("stage", "state", "time", ""), rows))


def shown_verdict(verdict: Verdict) -> bool:
    """Show what the check of a config found; whether it can be run."""
    for item in verdict.refused:
        parts = [item.detail] if item.detail != item.field else []
        parts += [f"{name} {text}" for name in ("expected", "got") if (text := getattr(item, name))]
        parts += [item.hint] if item.hint else []
        note(f"{item.field}: {', '.join(parts)}" if item.field else ", ".join(parts), "red")
    for text in verdict.notes:
        note(f"note: {text}")
    if verdict.student_parameters is not None and verdict.teacher_parameters is not None:
        sizes = [format_count(number, 4) for number in (verdict.teacher_parameters, verdict.student_parameters)]
        note(f"parameters: {sizes[0]} → {sizes[1]}", "")
    if (estimate := verdict.estimate) is not None:
        speed = f"{format_count(estimate.tokens_per_second)} tokens/s, {format_duration(86_400 * estimate.days)}"
        fits = "" if estimate.fits else "; it does not fit"
        cluster = estimate.cluster
        devices = f"{cluster.get('nodes', 1) * cluster.get('gpus_per_node', 1)} × {cluster.get('gpu')}"
        assumed = f"; for {devices}, as no GPU of the service's machine is known" if estimate.assumed else ""
        note(f"estimate: {format_size(estimate.gpu_bytes)} a device, {speed}{fits}{assumed}", "")
    note("it can be run" if verdict.valid else "it cannot be run", "green" if verdict.valid else "red")
    return verdict.valid


def _state(state: str) -> Text:
    return Text(state, STATE_COLOURS.get(state, ""))
