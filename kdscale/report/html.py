"""The report of a run: report.json (every figure) and one report.html that needs nothing but a browser.

Reads files only. Everything shown is escaped: prompts, answers, names and paths are not our own text.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kdscale import units
from kdscale.config.load import dump_yaml
from kdscale.files import write_json, write_text
from kdscale.report import bias_plots, downstream_plots, importance_plots, pruning_plots, training_plots
from kdscale.report.facts import for_json, gather
from kdscale.report.tradeoff.plots import tradeoffs
from kdscale.report.tradeoff.points import from_json
from kdscale.runs.models import DISTILLED, PRUNED, START, TEACHER, model_title

_TEMPLATES = Path(__file__).parent / "templates"

# Classes of report.css.j2: models with a colour of their own, and those that other models take in turn.
_MODEL_CLASSES = {TEACHER: TEACHER, PRUNED: PRUNED, START: PRUNED, DISTILLED: DISTILLED}
_OTHER_CLASSES = ("other-1", "other-2", "other-3")

_MISSING_NOTES = {
    "config": "This folder holds no resolved config.",
    "plan": "There is no plan yet, so the student’s shape is not known.",
    "importance": "There are no importance scores yet.",
    "distillation": "The student has not been distilled yet.",
    "evaluation": "No model has been evaluated yet.",
}


def write_report(run_dir: Path, out_dir: Path) -> Path:
    """Write report.json and report.html into `out_dir`; returns the page's path.

    A run that is not finished gives a report that says what is missing. Raises RunFolderError when `run_dir` is no
    folder, and FileError, CheckpointError or RunFolderError for a damaged file in it.
    """
    facts = gather(run_dir)
    page = render(facts)
    write_json(out_dir / "report.json", for_json(facts))
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def page_environment() -> Environment:
    """Templates of pages: everything is escaped, and a name that a template lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": units.format_count,
        "size": units.format_size,
        "duration": units.format_duration,
        "share": lambda value: f"{100 * value:.0f} %",
        "figure": _plain_figure,
    }
    return environment


def model_class(name: str) -> str:
    """The class that colours a model of this name: its own, or that of all others."""
    return _MODEL_CLASSES.get(name, _OTHER_CLASSES[0])


def render(facts: Mapping[str, Any]) -> str:
    """The page for the facts that `gather` returns. Equal facts give equal bytes."""
    template = page_environment().get_template("report.html.j2")
    return template.render(
        facts=facts,
        teacher=TEACHER,
        missing=[_MISSING_NOTES[name] for name in facts["missing"]],
        models=_models(facts["evaluation"]),
        task_models=_models(facts["downstream"]),
        bias_models=_models(facts["bias"]),
        groups={name: list(rows) for name, rows in itertools.groupby(facts["comparison"] or [], itemgetter("group"))},
        plot_of_tasks=downstream_plots.curve(facts),
        plots_of_bias=bias_plots.by_group(facts),
        speed=facts["speed"],
        tradeoffs=tradeoffs(from_json(facts["models"])),
        curves=training_plots.curves(facts),
        terms=training_plots.terms(facts),
        importance=importance_plots.importance(facts),
        cumulative=pruning_plots.cumulative(facts),
        repair=pruning_plots.repair(facts),
        candidates=pruning_plots.candidates(facts),
        made=_how_made(facts),
        config_text=dump_yaml(facts["config"]) if facts["config"] else "",
    )


def _models(evaluation: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The models of a result in their order: name, column title, and the class that colours them."""
    names = list(evaluation["models"]) if evaluation else []
    others = itertools.cycle(_OTHER_CLASSES)
    return [
        {"name": name, "title": model_title(name), "css": _MODEL_CLASSES.get(name) or next(others)} for name in names
    ]


def _how_made(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value pairs: what a reader needs to judge or repeat the figures."""
    out: list[tuple[str, str]] = []
    config, evaluation = facts["config"] or {}, facts["evaluation"]
    if teacher := config.get("teacher", {}).get("path"):
        out.append(("Teacher", str(teacher)))
    if teachers := config.get("distill", {}).get("teachers"):
        out.append(("Teachers", ", ".join(str(entry.get("name")) for entry in teachers)))
    for name, alignment in (facts["alignment"] or {}).items():
        out.append((f"Tokens of {name}", str(alignment.get("in_words"))))
    if ready := config.get("student"):
        out.append(("Student", str(ready.get("path"))))
    if sources := config.get("data", {}).get("sources"):
        out.append(("Text", ", ".join(str(source.get("path")) for source in sources)))
    if facts["curves"] and facts["curves"]["train"]:
        last = facts["curves"]["train"][-1]
        speed = facts["curves"]["tokens_per_second"]
        text = f"{last['tokens']:,} tokens in {last['step']:,} steps" if "tokens" in last else f"{last['step']:,} steps"
        out.append(("Distilled on", text + (f", {units.format_number(speed)} tokens/s" if speed else "")))
    if evaluation:
        made = evaluation["settings"]
        text = f", {made['bytes']:,} bytes" if made.get("bytes") else ""
        out.append(("Evaluated on", f"{made['tokens']:,} held-out tokens{text}, sequences of {made['seq_len']}"))
        out.append(("Evaluated in", f"{made['dtype']} on {made['device_name']}, {made['threads']} CPU threads"))
    if config.get("seed") is not None:
        out.append(("Seed", str(config["seed"])))
    versions: dict[str, str] = {}
    for stage in facts["stages"]:
        versions |= stage["versions"] or {}
    if not versions and evaluation:
        versions = {name: evaluation["settings"][name] for name in ("torch", "transformers")}
    if versions:
        out.append(("Versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))))
    return out


def _plain_figure(value: Any) -> str:
    return units.format_number(value) if isinstance(value, int | float) else str(value)
