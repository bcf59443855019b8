"""What the commands print: tables for people, made from the run folder's JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdscale.errors import RunFolderError
from kdscale.files import read_json
from kdscale.metrics import read_metrics
from kdscale.runs.doctor import Finding, State
from kdscale.runs.folder import RunFolder
from kdscale.runs.pipeline import STAGES

_MARK = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]"}
_STATE = {
    "done": "[green]done[/]", "running": "[cyan]running[/]", "failed": "[red]failed[/]",
    "interrupted": "[yellow]interrupted[/]", "waiting": "[dim]waiting[/]", "stopped": "[yellow]stopped[/]",
}  # fmt: skip


def _print(table: Table) -> None:
    Console(soft_wrap=False).print(table)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right_from: int | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if right_from is not None and index >= right_from else "left")
    for row in rows:
        table.add_row(*row)
    return table


def findings(found: Sequence[Finding], conclusions: Sequence[Finding]) -> None:
    for title, lines in (("This machine", found), ("What follows", conclusions)):
        _print(_table(title, ("", "", ""), [(line.topic, _mark(line.state), line.found) for line in lines]))


def preflight(found: Sequence[Finding]) -> None:
    """What every host said before a job."""
    _print(_table("Preflight", ("", "", ""), [(line.topic, _mark(line.state), line.found) for line in found]))


def _mark(state: State) -> str:
    return _MARK[state]


def plan(plan_json: dict[str, Any]) -> None:
    """The shape before and after, and what it means in parameters."""
    teacher, student = plan_json["teacher"], plan_json["student"]
    rows = [(axis, str(teacher[axis]), str(student[axis])) for axis in teacher if axis != "vocab"]
    for kind in ("total", "non_embedding"):
        before, after = (plan_json[f"{who}_params"][kind] for who in ("teacher", "student"))
        rows.append((f"{kind.replace('_', '-')} parameters", f"{before / 1e6:,.1f} M", f"{after / 1e6:,.1f} M"))
    _print(_table("Student's shape", ("", "teacher", "student"), rows, right_from=1))
    for warning in plan_json.get("warnings", []):
        Console().print(f"note: {warning}", style="yellow", highlight=False)


def results(folder: Path, last_stage: str) -> None:
    """After a command: the plan, or the final figures and where everything is."""
    run = RunFolder(folder)
    if last_stage == "plan":
        plan(read_json(run.plan))
    if last_stage in ("eval", "report"):
        _side_by_side(read_json(run.eval / "eval.json"))
    if last_stage == "report":
        student = ("student (standard checkpoint)", run.student)
        places = [student, ("report", run.report / "report.html"), ("figures", run.report / "report.json")]
        places += [("training curve", run.logs / "metrics.jsonl")]
        _print(_table("Where everything is", ("", ""), [(name, str(path)) for name, path in places]))


def _side_by_side(evaluation: dict[str, Any]) -> None:
    models = {name: evaluation["models"][name]["quality"] for name in ("teacher", "pruned", "distilled")}
    shown = (
        ("perplexity", "perplexity", "{:.2f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"),
        ("KL to the teacher", "kl_to_teacher", "{:.4f}"),
        ("top-1 agreement", "top1_agreement", "{:.1%}"),
    )
    rows = [
        (title, *("" if quality[key] is None else form.format(quality[key]) for quality in models.values()))
        for title, key, form in shown
    ]
    _print(_table("Held-out text", ("", *models), rows, right_from=1))


def status(folder: Path) -> None:
    """How far each stage is, and the training curve's last figures. Raises RunFolderError when it is no run."""
    run = RunFolder(folder)
    if not run.config.exists():
        raise RunFolderError(
            f"{folder} is not a run folder", expected="a folder with config.yaml", hint="check the path"
        )
    recorded = read_json(run.status)["stages"] if run.status.exists() else {}
    alive = run.in_use()
    rows = []
    for stage in STAGES:
        entry = recorded.get(stage.name, {"state": "waiting"})
        state = entry["state"]
        if state == "running" and not alive:
            state = "stopped"
        facts = " · ".join(f"{name} {value}" for name, value in entry.get("facts", {}).items())
        detail = facts or entry.get("reason", "").splitlines()[0:1] or ""
        seconds = f"{entry['seconds']:.1f} s" if "seconds" in entry else ""
        rows.append((stage.name, _STATE[state], seconds, detail if isinstance(detail, str) else detail[0]))
    _print(_table(str(folder), ("stage", "state", "time", ""), rows))
    last = [row for row in read_metrics(run.logs / "metrics.jsonl") if row["kind"] == "train"][-1:]
    for row in last:
        shown = {
            key: value for key, value in row.items() if key in ("step", "tokens", "loss", "lr", "tokens_per_second")
        }
        Console().print("training: " + " · ".join(f"{key} {value:g}" for key, value in shown.items()), highlight=False)
