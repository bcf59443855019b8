"""What the commands print: tables for people, made from the run folder's JSON files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import FileError, RunFolderError
from kdscale.escaping import for_terminal
from kdscale.files import read_json
from kdscale.jobs.doctor import Finding
from kdscale.pipeline.progress import StageProgress, config_of, rows_of, stage_progress, training_progress
from kdscale.pipeline.stage import Stage
from kdscale.report.bias_facts import bias
from kdscale.report.comparison import is_evaluation, students, worsened
from kdscale.report.downstream_facts import downstream
from kdscale.runs.folder import BIAS, DOWNSTREAM, EVAL_FILE, RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runs.models import model_title
from kdscale.sizing.capacity import Capacity
from kdscale.units import compact_count, compact_size, format_count, format_duration, format_number

# colours
_SEVERITIES = {"ok": "green", "note": "yellow", "bad": "red"}
STATE_COLOURS = {  # of stages, and of a service's runs
    "done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "waiting": "dim", "stopped": "yellow",
    "succeeded": "green", "starting": "cyan", "recovering": "yellow", "pausing": "yellow", "paused": "yellow",
    "cancelling": "yellow", "cancelled": "dim", "queued": "dim",
}  # fmt: skip


def _print(table: Table) -> None:
    Console(soft_wrap=False).print(table)


def note(text: str, style: str = "yellow") -> None:
    """One line of any length, in a colour."""
    Console().print(for_terminal(text), style=style, highlight=False, markup=False)


def trials(verdict: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The trials of a sweep, the best first."""
    _print(table(verdict, columns, rows, right_from=2))


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right_from: int | None = None) -> None:
    """One table, as wide as the terminal."""
    _print(table(title, columns, rows, right_from=right_from))


def width_of(table: Table) -> int:
    """How many columns of a terminal a table takes when nothing in it is wrapped."""
    console = Console()
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    right_from: int | None = None,
    nowrap: bool = False,
) -> Table:
    """A table in the look of all commands; columns from number `right_from` on are aligned to the right.

    A string is shown as it is: nothing in it is markup.
    """
    table = Table(
        title=Text(for_terminal(title), "bold"),
        title_justify="left",
        header_style="dim",
        box=None,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        justify: JustifyMethod = "right" if right_from is not None and index >= right_from else "left"
        # a long word such as a path is folded where it may be, and never cut without a sign
        table.add_column(
            Text(for_terminal(column)), no_wrap=nowrap, justify=justify, overflow="ellipsis" if nowrap else "fold"
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(for_terminal(cell)) for cell in row))
    return table


def findings(title: str, answers: Sequence[Finding]) -> None:
    """What `kdscale doctor` or a job's preflight has learned."""
    rows = [(line.topic, Text(line.severity, _SEVERITIES[line.severity]), line.text) for line in answers]
    _print(table(title, ("", "", ""), rows))


def plan(plan_json: dict[str, Any], distill_tokens: int, step: str = "", pruned: str = "teacher") -> None:
    """The shape before and after, what it means in parameters, and what else was compared.

    `step`: whose plan it is, "" for the run's own; `pruned`: the model that is cut, the teacher or a step's student.
    """
    _candidates(plan_json)
    teacher, student = plan_json["teacher"], plan_json["student"]
    rows = [(axis, str(teacher[axis]), str(student[axis])) for axis in teacher if axis != "vocab" and teacher[axis]]
    for counted in ("total", "non_embedding", "active"):
        before, after = (plan_json[f"{who}_params"].get(counted) for who in ("teacher", "student"))
        if before is not None:  # a dense model has none that a token leaves out
            rows.append((f"{counted.replace('_', '-')} parameters", format_count(before, 4), format_count(after, 4)))
    _print(table(f"Shape of step {step}" if step else "Student's shape", ("", pruned, "student"), rows, right_from=1))
    before, after = (plan_json[f"{who}_params"]["total"] for who in ("teacher", "student"))
    capacity = Capacity(before, after, distill_tokens)
    for warning in [*plan_json.get("warnings", []), *capacity.warnings()]:
        note(f"note: {warning}")


def _candidates(plan_json: dict[str, Any]) -> None:
    """The shapes that met the budget; columns that say the same of all of them or of none are left out."""
    rows = plan_json["candidates"]
    if len(rows) == 1:
        return
    cuttable = [axis for axis in plan_json["student"] if axis in rows[0] and len({row[axis] for row in rows}) > 1]
    score = "balance" if plan_json["methods"]["search"] == "balanced" else "predicted"
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        axis: lambda row, axis=axis: str(row[axis])  # type: ignore[misc]
        for axis in cuttable
    }
    columns |= {
        "params": lambda row: compact_count(row["params"]),
        "active": lambda row: compact_count(row["active"]) if row.get("active") else "",
        "on disk": lambda row: compact_size(row["bytes"]),
        "KV/tok": lambda row: compact_size(row["kv_bytes"]),
        "decode": lambda row: "" if row["decode_ms"] is None else f"{row['decode_ms']:.3g}ms",
        "prefill": lambda row: "" if row["prefill_ms"] is None else f"{row['prefill_ms']:.3g}ms",
        score: lambda row: f"{row['score']:.3f}",
        "KL": lambda row: f"{row['masked']['kl']:.4f}" if row["masked"] else "",
        "loss": lambda row: f"{row['masked']['loss']:.4f}" if row["masked"] else "",
        "accepted": _accepted,
        "accuracy": lambda row: _answered(row, "accuracy", ".1%"),
        "task": lambda row: _answered(row, "score", ".3f"),
        "behind": lambda row: _answered(row, "behind", ".3f"),
        "probe": lambda row: f"{row['probes'][-1]['loss']:.4f}" if row["probes"] else "",
        "": lambda row: "chosen" if row is rows[0] else "",
    }
    if any(row["masked"] for row in rows):
        note("KL, loss: masked runs on calibration text, nats per token", "dim")
    if any(map(_accepted, rows)):
        note("accepted: tokens that the teacher accepts from such a draft at temperature 1, on the same text", "dim")
    if any(_answered(row, "score", ".3f") for row in rows):
        asked_of = next(row["masked"]["task"] for row in rows if row["masked"])
        note(
            f"task: score on {asked_of['items']:,} items, ± one standard error; the teacher's is "
            f"{asked_of['teacher_score']:.3f}, its accuracy {asked_of['teacher_accuracy']:.1%}; "
            "behind: what is missing to the best, on the same items",
            "dim",
        )
    shown = {title: cell for title, cell in columns.items() if any(cell(row) for row in rows)}
    asked = plan_json["target"]["asked"]
    title = f"{plan_json['candidates_tried']:,} shapes meet {asked}; the best {len(rows)}"

    def drawn() -> Table:
        cells = [[cell(row) for cell in shown.values()] for row in rows]
        return table(title, tuple(shown), cells, right_from=0, nowrap=True)

    left_out = []
    for column in (
        "KV/tok",
        "on disk",
        "loss",
        "active",
        score,
        "accuracy",
        "prefill",
        "decode",
        "KL",
    ):  # eighty columns hold only so much
        if column in shown and width_of(drawn()) > Console().width:
            del shown[column]
            left_out.append(column)
    _print(drawn())
    if left_out:
        note(f"not shown for lack of room (plan.json has them): {', '.join(left_out)}", "dim")


def _accepted(row: dict[str, Any]) -> str:
    """The share of a candidate's tokens that the teacher accepts; "" where that was not asked for."""
    value = (row["masked"] or {}).get("acceptance")
    return "" if value is None else f"{value:.1%}"


def _answered(row: Mapping[str, Any], figure: str, form: str) -> str:
    """A figure of a candidate's answers to tasks ± its standard error; "" for a candidate that was not asked."""
    task = (row["masked"] or {}).get("task")
    return f"{format(task[figure], form)} ± {format(task[f'{figure}_error'], form)}" if task else ""


def results(folder: Path, last_stage: str) -> None:
    """After a command: the plan, or the final figures and where everything is."""
    run = RunFolder(folder)
    if last_stage == "plan":
        plan(read_json(run.plan), load_config(run.config).distill.tokens)
    if last_stage in ("eval", "report") and (run.eval / EVAL_FILE).exists():
        _side_by_side(run.eval / EVAL_FILE)
    if last_stage in ("downstream", "report"):
        _tasks(run.at(DOWNSTREAM))
    if last_stage in ("bias", "report"):
        _bias(run)
    if last_stage == "report":
        _places(run)


def _places(run: RunFolder) -> None:
    """One line per path that exists, however long: a path cut short, as a table would, cannot be copied."""
    named = [("student (standard checkpoint)", run.student), ("pruned, not distilled", run.pruned)]
    named += [("report", run.report / "report.html"), ("figures", run.report / "report.json")]
    places = [(name, path) for name, path in (*named, ("training curve", run.metrics)) if path.exists()]
    if not places:
        return
    console = Console(soft_wrap=True)
    console.print("Where everything is", style="bold")
    width = max(len(name) for name, _ in places)
    for name, path in places:
        console.print(for_terminal(f"{name:<{width}}  {path}"), highlight=False, markup=False)


_QUALITY = (
    ("perplexity", "quality", "perplexity", "{:.2f}"),
    ("bits per byte", "quality", "bits_per_byte", "{:.4f}"),
    ("KL to the teacher", "quality", "kl_to_teacher", "{:.4f}"),
    ("top-1 agreement", "quality", "top1_agreement", "{:.1%}"),
    ("similarity kept", "quality", "similarity_kept", "{:.3f}"),
    ("nearest neighbour kept", "quality", "neighbour_kept", "{:.1%}"),
    ("accuracy of classes", "quality", "class_accuracy", "{:.1%}"),
    ("class as the teacher's", "quality", "class_agreement", "{:.1%}"),
    ("accepted as a draft", "quality", "acceptance", "{:.1%}"),
    ("expected speed-up as a draft", "draft", "speed_up", "{:.2f}"),
)


def _side_by_side(path: Path) -> None:
    """Quality of every evaluated model, in the order of the evaluation."""
    try:
        evaluation = read_json(path)
    except FileError:
        evaluation = None
    if not is_evaluation(evaluation):
        note(f"warning: {path} is damaged; kdscale run makes it again")
        return
    models = evaluation["models"]
    rows = []
    for title, section, key, form in _QUALITY:
        values = [model.get(section, {}).get(key) for model in models.values()]
        if any(value is not None for value in values):  # evaluations of older versions have fewer figures
            rows.append((title, *("" if value is None else form.format(value) for value in values)))
    _print(table("Held-out text", ("", *models), rows, right_from=1))
    if worse := worsened(evaluation):
        before, after = (model_title(students(evaluation)[at]).lower() for at in (0, -1))
        note(f"note: worse in the {after} student than in the {before} one: {', '.join(worse)}")


def _tasks(folder: Path) -> None:
    """Scores of every model on tasks, where there are any, and what distilling changed."""
    try:
        tasks = downstream(folder)
    except RunFolderError as error:
        note(f"warning: {error}")
        return
    if tasks is None:
        return

    rows = [(row["title"], *(_with_error(cell) for cell in row["cells"].values())) for row in tasks["rows"]]
    _print(table("Tasks with right answers", ("", *tasks["models"]), rows, right_from=1))
    for change in tasks["changes"]:
        last = change["rows"][-1]
        flips = f"{last['rose']:,} items wrong → right, {last['fell']:,} right → wrong"
        note(f"{change['title'].lower()}: {last['change']} points ({last['interval']}), {flips}", "")
    if tasks["sample"]:
        note(f"note: {tasks['sample']}", "dim")


def _bias(run: RunFolder) -> None:
    """Of each measure of bias the figure with the verdict, its growth since the teacher, and the verdict."""
    config = config_of(run)
    limits = config.bias.fail_if if config is not None and config.bias is not None else {}
    try:
        found = bias(run.at(BIAS), limits)
    except RunFolderError as error:
        note(f"warning: {error}")
        return
    if found is None:
        return
    rows = []
    for measure in found["measures"]:
        cells: dict[str, Any] = next((row["cells"] for row in measure["rows"] if row["headline"]), {})
        changes = {change["model"]: change for change in measure["changes"]}
        for at, name in enumerate(found["models"]):
            change = changes.get(name, {})
            title = "" if at else measure["title"]
            rows.append(
                (title, name, _with_error(cells.get(name, {})), change.get("growth") or "", change.get("verdict", ""))
            )
    _print(table("Bias and safety", ("", "", "figure", "growth", "verdict"), rows))
    for line in [*found["too_much"], *found["notes"]]:
        note(f"note: {line}")


def _with_error(cell: dict[str, Any]) -> str:
    text = cell.get("text", "–")
    return text + (f" ± {cell['error_text']}" if cell.get("error_text") else "")


def status(folder: Path) -> None:
    """How far each stage is, the time training still needs, results and paths. Raises RunFolderError for no run."""
    run = RunFolder(folder)
    if not run.config.exists():
        raise RunFolderError(
            f"{folder} is not a run folder", expected="a folder with config.yaml", hint="check the path"
        )
    for step in sorted(run.steps.glob("*/config.yaml")):
        inner = RunFolder(step.parent)
        inner_config = config_of(inner)
        _stages(inner, [stage for stage in rows_of(inner_config) if stage.in_steps], inner_config)
    config = config_of(run)
    finished = _stages(run, rows_of(config), config)
    results(folder, "report")
    if not finished and not run.in_use():
        console = Console(soft_wrap=True)
        command = f"kdscale run {shlex.quote(str(folder))}"
        console.print(for_terminal(f"go on with: {command}"), highlight=False, markup=False)


def _stages(run: RunFolder, stages: Sequence[Stage], config: Config | None) -> bool:
    """One line per stage, and one of the training if it has begun; returns whether all stages are done."""
    alive = run.in_use()
    progress = stage_progress(run, stages, alive, note)
    rows = []
    for stage in progress:
        facts = [
            f"{name} {value if isinstance(value, str) else format_number(value)}" for name, value in stage.facts.items()
        ]
        detail = " · ".join(facts) or next(iter(stage.reason.splitlines()), "")
        rows.append((stage.name, Text(stage.state, STATE_COLOURS[stage.state]), _time_taken(stage), detail))
    # a path that is wrapped cannot be copied
    Console(soft_wrap=True).print(for_terminal(str(run.path)), style="bold", highlight=False, markup=False)
    _print(table("", ("stage", "state", "time", ""), rows))
    trained = [row for row in read_metrics(run.metrics) if row["kind"] == "train"]
    if trained:
        note(f"training: {_training(trained[-1], _time_left(config, trained, alive))}", "")
    return all(stage.state == "done" for stage in progress)


def _time_taken(stage: StageProgress) -> str:
    """How long a finished stage took, or a running one has been running."""
    if stage.seconds is not None:
        return format_duration(stage.seconds)
    so_far = stage.seconds_so_far(datetime.now(UTC)) if stage.state == "running" else None
    return "" if so_far is None else f"{format_duration(so_far)} so far"


def _time_left(config: Config | None, trained: Sequence[dict[str, Any]], alive: bool) -> str:
    """`40 % done · 3 min 20 s left`, at the speed of the last steps; empty when all steps are done."""
    training = training_progress(config, trained) if config is not None else None
    if training is None or not 0 < training.step < training.steps:
        return ""
    text = f"{100 * training.step / training.steps:.0f} % done"
    if training.seconds_left is not None:
        text += f" · {format_duration(training.seconds_left)} left" + ("" if alive else " once it runs again")
    return text


def _training(row: dict[str, Any], left: str) -> str:
    """The last row of the training log in words, and what is left; columns that it lacks are left out."""
    texts = {
        "step": f"step {row.get('step', 0):,}" + (f" · {left}" if left else ""),
        "tokens": f"{row.get('tokens', 0):,} tokens",
        "loss": f"loss {row.get('loss', 0):.4f}", "lr": f"learning rate {row.get('lr', 0):.3g}",
        "tokens_per_second": f"{format_number(float(row.get('tokens_per_second', 0)))} tokens/s",
    }  # fmt: skip
    return " · ".join(text for key, text in texts.items() if key in row)
