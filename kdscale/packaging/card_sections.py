"""What the files of a run add to a model card: one row a file, with its Markdown and its results for the hub.

The report stage writes all of them into the student's card, and a package takes them from there. A new kind of
measurement adds a row to `SECTIONS` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.escaping import for_markdown
from kdscale.files import read_json
from kdscale.runs.folder import BIAS, BIAS_FILE, DOWNSTREAM, DOWNSTREAM_FILE, EVAL, EVAL_FILE
from kdscale.runs.models import DISTILLED, model_title
from kdscale.units import decimals, format_count, format_number, format_size


@dataclass(frozen=True)
class Result:
    """What was measured of the student on one data set, for the front matter's `model-index`."""

    task: str  # a task of the hub, such as text-generation or multiple-choice
    dataset: str  # as people read it
    dataset_type: str  # the hub's name of the data set, or any word for one that is not there
    metrics: Mapping[str, float]  # by the hub's name of the metric


@dataclass(frozen=True)
class CardSection:
    """One row of the card's measurements. Both functions are given the content of the file."""

    file: str  # JSON in the run folder; where it is not there, the card has no such section
    title: str
    markdown: Callable[[Any], str]  # may be empty; what came from files or configs goes through `for_markdown`
    results: Callable[[Any], Iterable[Result]] = lambda content: ()


def measured(run: Path) -> tuple[str, list[Result]]:
    """All sections of what the run folder holds, as Markdown and as results. Raises FileError for a damaged file."""
    parts: list[str] = []
    results: list[Result] = []
    for section in SECTIONS:
        if not (run / section.file).exists():
            continue
        content = read_json(run / section.file, expect=dict)
        if text := section.markdown(content).strip():
            parts.append(f"### {section.title}\n\n{text}")
        results += section.results(content)
    return "\n\n".join(["## Measured", *parts]) if parts else "", results


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every cell is escaped, and numbers stand to the right."""
    lines = [_row(columns), "|---|" + "---:|" * (len(columns) - 1), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(for_markdown(cell) for cell in cells) + " |"


def _number(value: float) -> str:
    return format_number(float(value))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# Title, where the value and its standard error lie in a model's part of eval.json, and how it is written. No timings:
# equal students have equal cards, however busy the machine was; the report has them.
_FIGURES: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("Perplexity", "quality", "perplexity", _number),
    ("Bits per byte", "quality", "bits_per_byte", "{:.3f}".format),
    ("KL to the teacher, nats per token", "quality", "kl_to_teacher", "{:.3f}".format),
    ("Top-1 agreement with the teacher", "quality", "top1_agreement", _percent),
    ("Similarity kept, Spearman", "quality", "similarity_kept", "{:.3f}".format),
    ("Accuracy of classes", "quality", "class_accuracy", _percent),
    ("Class as the teacher's", "quality", "class_agreement", _percent),
    ("Parameters", "size", "parameters", format_count),
    ("Weights", "size", "weight_bytes", format_size),
    ("KV cache per token, 16-bit", "size", "kv_cache_bytes_per_token", format_size),
)


def _quality(evaluation: Mapping[str, Any]) -> str:
    """The models side by side, each figure with its standard error."""
    models, settings = evaluation["models"], evaluation["settings"]
    rows = []
    for title, part, key, written in _FIGURES:
        cells = [_cell(model.get(part) or {}, key, written) for model in models.values()]
        if any(cells):
            rows.append((title, *cells))
    text = table(("", *map(model_title, models)), rows)
    return (
        f"{settings['tokens']:,} held-out tokens in sequences of {settings['seq_len']:,}, computed in "
        f"{for_markdown(str(settings['dtype']))}; ± is one standard error over documents.\n\n{text}"
    )


def _cell(figures: Mapping[str, Any], key: str, written: Callable[[float], str]) -> str:
    value, error = figures.get(key), figures.get(f"{key}_standard_error")
    if value is None:
        return ""
    text = written(value)
    if error is None:
        return text
    if text.endswith("%"):
        return f"{text} ± {100 * error:.1f}"
    places = len(text.partition(".")[2]) or decimals(value)
    return f"{text} ± {error:.{places}f}"


def _quality_results(evaluation: Mapping[str, Any]) -> list[Result]:
    quality = evaluation["models"].get(DISTILLED, {}).get("quality", {})
    metrics = {key: float(quality[key]) for key in ("perplexity", "bits_per_byte") if quality.get(key) is not None}
    return [Result("text-generation", "held-out text of the run", "held-out", metrics)] if metrics else []


def _tasks(content: Mapping[str, Any]) -> str:
    """Accuracy of the models on each task; says where only a sample was asked."""
    tasks, models = content["tasks"], content["models"]
    rows = []
    for name, task in tasks.items():
        title = f"{name} ({task['metric']}, {task['num_fewshot']}-shot)"
        rows.append((title, *(_accuracy(model["tasks"][name]) for model in models.values())))
    if len(tasks) > 1:
        rows.append(("mean", *(_accuracy(model["mean"]) for model in models.values())))
    sample = [
        f"{for_markdown(name)} {task['items']:,} of {task['available']:,}"
        for name, task in tasks.items()
        if task["items"] < task["available"]
    ]
    note = f" Not comparable with published figures, as only a sample was asked: {', '.join(sample)}." if sample else ""
    how = f"Scored by lm-evaluation-harness {for_markdown(str(content['settings']['lm_eval']))}"
    return f"{how}; ± is one standard error over items.{note}\n\n{table(('', *map(model_title, models)), rows)}"


def _accuracy(mean: Mapping[str, Any]) -> str:
    error = mean["standard_error"]
    return _percent(mean["value"]) + ("" if error is None else f" ± {100 * error:.1f}")


def _task_results(content: Mapping[str, Any]) -> list[Result]:
    """Accuracies of whole tasks; a sample is no result for a leaderboard."""
    model = content["models"].get(DISTILLED)
    return [
        Result("multiple-choice", name, name, {task["metric"]: float(model["tasks"][name]["value"])})
        for name, task in content["tasks"].items()
        if model is not None and task["items"] == task["available"]
    ]


def _bias(content: Mapping[str, Any]) -> str:
    """One figure of each measure for every model, and what became of it on the way from the teacher."""
    models, rows = content["models"], []
    for key, measure in content["measures"].items():
        label = "" if key == measure["measure"] else f" ({key})"
        figure, part = measure["headline"], measure["all"]
        words = measure["figures"][figure]
        places = 1 if words["range"] > 1 else 3
        cells = []
        for name in models:
            one = part["figures"][name][figure]
            error = "" if one["error"] is None else f" ± {one['error']:.{places}f}"
            cells.append("" if one["value"] is None else f"{one['value']:.{places}f}{error}")
        change = part["changes"].get(DISTILLED, {}).get("figures", {}).get(figure, {})
        title = f"{measure['title']}{label}: {words['title']}" + (
            "" if words["ideal"] is None else f" ({words['ideal']:g})"
        )
        rows.append((title, *cells, change.get("verdict", "not measurable")))
    text = table(("", *map(model_title, models), "the student’s, against the teacher"), rows)
    return (
        "All models were asked the same items. In brackets the value of a model without bias; ± is one standard error. "
        "A bias that is kept or not measurable on these items may be there on others: test the use that you intend.\n\n"
        f"{text}"
    )


SECTIONS: tuple[CardSection, ...] = (
    CardSection(f"{EVAL.path}/{EVAL_FILE}", "On held-out text", _quality, _quality_results),
    CardSection(f"{DOWNSTREAM.path}/{DOWNSTREAM_FILE}", "On tasks with right answers", _tasks, _task_results),
    CardSection(f"{BIAS.path}/{BIAS_FILE}", "Bias and safety", _bias),
)
