"""What came of a sweep: sweep.json, sweep.html, best.yaml, and the rows of the terminal's table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.load import build_config, dump_config, find_config, load_config
from kdscale.config.sweep import OBJECTIVES, SIZES, Range, SweepConfig
from kdscale.files import write_json, write_text
from kdscale.jobs.sweep import plots
from kdscale.jobs.sweep.space import changed
from kdscale.jobs.sweep.trials import folder_of, trials_of, winners
from kdscale.report.comparison import FIGURES, written
from kdscale.report.html import page_environment
from kdscale.units import format_duration

if TYPE_CHECKING:
    import optuna

SCHEMA_VERSION = 1
_WORDS = {"COMPLETE": "complete", "PRUNED": "ended early", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
_TITLES = {figure.key: figure for figure in FIGURES if figure.key in (*OBJECTIVES, *SIZES)}


def write_results(settings: SweepConfig, study: optuna.Study) -> dict[str, Any]:
    """Write the files of what there is so far; returns what sweep.json holds."""
    folder, facts = Path(settings.folder), gather(settings, study)
    best = best_config(settings, facts)
    if best is not None:
        write_text(folder / "best.yaml", best)
    drawings = [plots.progress(facts), plots.front(facts), plots.by_field(facts)]
    columns, rows = table_of(facts)
    page = (
        page_environment()
        .get_template("sweep.html.j2")
        .render(facts=facts, plots=[plot for plot in drawings if plot], columns=columns, rows=rows, best_yaml=best)
    )
    write_text(folder / "sweep.html", page)
    write_json(folder / "sweep.json", facts)
    return facts


def gather(settings: SweepConfig, study: optuna.Study) -> dict[str, Any]:
    """Every trial with its values and what it reached, JSON-ready."""
    best = {trial.number for trial in winners(study)}
    trials = [
        {
            "number": folder_of(trial),
            "state": _WORDS[trial.state.name],
            "draw": trial.params,
            "value": trial.values[0] if trial.values else None,
            "size": trial.values[1] if trial.values and settings.size else None,
            "seconds": trial.user_attrs.get("seconds"),
            "message": trial.user_attrs.get("message"),
            "best": trial.number in best,
        }
        for trial in trials_of(study)
    ]
    objective, size = _TITLES[settings.objective], _TITLES.get(settings.size or "")
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": Path(settings.folder).name,
        "base": settings.base,
        "objective": settings.objective,
        "objective_title": objective.title,
        "minimize": OBJECTIVES[settings.objective],
        "size_title": size.title if size else None,
        "fields": {
            field: choices.model_dump() if isinstance(choices, Range) else {"values": list(choices)}
            for field, choices in settings.search.items()
        },
        "trials": trials,
        "failed": [trial for trial in trials if trial["state"] == "failed"],
    }
    facts["verdict"] = _verdict(facts)
    return facts


def _verdict(facts: Mapping[str, Any]) -> str:
    counts = {word: sum(trial["state"] == word for trial in facts["trials"]) for word in _WORDS.values()}
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    best = _best(facts)
    if best is None:
        return f"Trials: {said or 'none yet'}"
    values = ", ".join(f"{field} {_value(value)}" for field, value in best["draw"].items())
    return f"Trials: {said}. Best: {facts['objective_title']} {_cell(facts, best['value'])} with {values}"


def _best(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The trial with the best objective, of a Pareto front too."""
    best = [trial for trial in facts["trials"] if trial["best"]]
    return min(best, key=lambda trial: trial["value"] if facts["minimize"] else -trial["value"], default=None)


def best_config(settings: SweepConfig, facts: Mapping[str, Any]) -> str | None:
    """The base config, with its own budget, and the best trial's values; None before a trial is finished."""
    best = _best(facts)
    if best is None:
        return None
    tree = changed(load_config(find_config(settings.base)).resolved(), best["draw"])
    return dump_config(build_config({**tree, "run_dir": str(Path(settings.folder) / "best")}, "the best trial"))


def table_of(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the trials, the best first."""
    sign = 1 if facts["minimize"] else -1
    order = sorted(facts["trials"], key=lambda t: (t["value"] is None, sign * (t["value"] or 0), t["number"]))
    shown = [field.rpartition(".")[2] for field in facts["fields"]]
    names = list(facts["fields"]) if len(set(shown)) < len(shown) else shown
    columns = [
        "trial",
        "",
        facts["objective_title"],
        *([facts["size_title"]] if facts["size_title"] else []),
        *names,
        "time",
    ]
    rows = []
    for trial in order:
        mark = ("best" if not facts["size_title"] else "front") if trial["best"] else ""
        state = mark or ("" if trial["state"] == "complete" else trial["state"])
        sizes = [_cell(facts, trial["size"], "size")] if facts["size_title"] else []
        values = [_value(trial["draw"].get(field)) for field in facts["fields"]]
        seconds = "" if trial["seconds"] is None else format_duration(trial["seconds"])
        rows.append([str(trial["number"]), state, _cell(facts, trial["value"]), *sizes, *values, seconds])
    return columns, rows


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _cell(facts: Mapping[str, Any], value: float | None, of: str = "objective") -> str:
    if value is None:
        return ""
    title = facts["objective_title"] if of == "objective" else facts["size_title"]
    form = next(figure.form for figure in FIGURES if figure.title == title)
    return written(value, form)
