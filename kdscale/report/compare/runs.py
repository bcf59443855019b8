"""Several runs side by side, from the files of their folders: plain values, no models, no torch.

A run shows what it has: one that is not finished lacks figures, and a damaged file is named and left out. Figures stand
beside each other only where they were measured alike: those of a run that was measured otherwise than the first are
marked, with what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kdscale.errors import FileError, KdscaleError, RunFolderError
from kdscale.families.dims import LAYERS_FIRST
from kdscale.files import read_json
from kdscale.report.bias_facts import bias
from kdscale.report.compare.settings import differing_fields, measured_with
from kdscale.report.comparison import FIGURES, Figure, is_evaluation, written, written_error
from kdscale.report.downstream_facts import downstream
from kdscale.report.facts import read_config
from kdscale.report.tradeoff.points import Point, as_json, points_of
from kdscale.runs.folder import BIAS, DOWNSTREAM, EVAL_FILE, METRICS, RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runs.models import CORRECTED, PRUNED, START, TEACHER, model_title

SCHEMA_VERSION = 1
_ACCURACY = Figure("Accuracy", "tasks", "accuracy", "Accuracy over tasks", "percent", "higher")
# The columns of a comparison: what of FIGURES tells runs apart at a glance, with short titles.
_SHOWN = {
    "perplexity": "Perplexity", "kl_to_teacher": "KL", "top1_agreement": "Top-1 agreement", "acceptance": "Accepted",
    "accuracy": "Accuracy", "parameters": "Parameters", "weight_bytes": "On disk",
    "kv_cache_bytes_per_token": "KV per token",
    "decode_tokens_per_second": "Decode, tokens/s", "saturated_tokens_per_second": "Most tokens/s",
    "joules_per_token": "J per token", "peak_memory_bytes": "Peak memory", "speed_up": "Speed-up as a draft",
}  # fmt: skip
_KINDS = {
    "quality": "quality", "by_source": "quality", "tasks": "tasks", "efficiency": "speed", "draft": "drafts",
    "bias": "bias",
}  # fmt: skip
Value = TypeVar("Value")


def gather(folders: Sequence[Path], labels: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that the page shows of the runs in `folders`, JSON-ready. Raises RunFolderError for no folder.

    `labels`: what the runs are called, each otherwise; by default their names or folders.
    """
    read = [_read(folder) for folder in folders]
    for run, label in zip(read, labels or _labels(read), strict=True):
        run["label"] = label
    unlike = _mark_unlike(read)
    models = _models(read)
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [{key: run[key] for key in _KEPT} for run in read],
        "columns": _columns(models),
        "bias": list({title: None for row in models for title in row["bias"]}),
        "models": models,
        "unlike": unlike,
        "config": differing_fields({run["label"]: run["config"] for run in read}),
        "points": as_json(_points(models)),
    }


_KEPT = ("label", "folder", "state", "damage", "teacher", "shape", "parameters", "trained_tokens", "steps", "settings",
         "lacks")  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    """What the folder of one run holds."""
    if not folder.is_dir():
        raise RunFolderError(f"run folder {folder} does not exist", expected="a run folder")
    run, damage = RunFolder(folder), list[str]()

    def sound(read: Callable[[], Value | None]) -> Value | None:
        """What `read` gives, or None with a note of what is damaged."""
        try:
            return read()
        except KdscaleError as error:
            damage.append(f"{error.what}: {error.got}" if error.got else error.what)
            return None

    config = sound(lambda: read_config(run.config)) or {}
    plan = sound(lambda: _checked(run.plan, _is_plan))
    evaluation = sound(lambda: _checked(run.eval / EVAL_FILE, is_evaluation))
    tasks = sound(lambda: downstream(run.at(DOWNSTREAM)))
    biased = sound(lambda: bias(run.at(BIAS)))
    trained = sound(lambda: _last_step(folder / METRICS.path))
    heldout = sound(lambda: _heldout_digests(run.stages / "data.json"))
    stages = run.recorded(damage.append)
    lacks = [
        name for name, found in (("plan", plan), ("training log", trained), ("evaluation", evaluation)) if found is None
    ]
    return {
        "name": str(config.get("name") or folder.name),
        "folder": str(folder),
        "state": _state(stages, evaluation is not None),
        "damage": damage,
        "lacks": lacks,
        "teacher": str(teacher.get("path") or "") if isinstance(teacher := config.get("teacher"), dict) else "",
        "shape": {axis: plan["student"][axis] for axis in LAYERS_FIRST if plan["student"].get(axis)} if plan else None,
        "parameters": plan["student_params"]["total"] if plan else None,
        "trained_tokens": (trained or {}).get("tokens"),
        "steps": (trained or {}).get("step"),
        "settings": measured_with(evaluation, tasks, biased, heldout),
        "config": config,
        "evaluation": evaluation,
        "tasks": tasks,
        "bias": biased,
        "unlike": [],  # kinds of figures that were measured otherwise than in the first run
    }


def _state(stages: Mapping[str, Any], evaluated: bool) -> str:
    """How far a run is: `finished` means that its models were evaluated and that no stage is to be gone on with."""
    open_ones = [f"{name} {entry['state']}" for name, entry in stages.items() if entry["state"] != "done"]
    if open_ones:
        return f"not finished: {', '.join(open_ones)}"
    return "finished" if evaluated else f"not finished: the last stage is {list(stages)[-1] if stages else 'none'}"


def _checked(path: Path, sound: Callable[[Any], bool]) -> Any:
    """The content of a JSON file, None where there is none. Raises FileError for one that kdscale did not write."""
    if not path.exists():
        return None
    content = read_json(path)
    if not sound(content):
        raise FileError(f"{path} is damaged", hint="kdscale run makes it again")
    return content


def _is_plan(value: Any) -> bool:
    """Whether a JSON value holds what is shown of plan.json."""
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key), dict) for key in ("student", "student_params")
    ):
        return False
    sizes = [value["student"].get(axis, 0) for axis in LAYERS_FIRST] + [value["student_params"].get("total")]
    return all(type(size) is int for size in sizes)


def _last_step(path: Path) -> dict[str, Any] | None:
    """The last row of a training log."""
    last = None
    for row in read_metrics(path):
        last = row if row["kind"] == "train" else last
    return last


def _heldout_digests(path: Path) -> dict[str, str] | None:
    """The digests of the held-out text by file, from the manifest of the stage that made it."""
    if not path.exists():
        return None
    outputs = read_json(path, RunFolderError, expect=dict).get("outputs")
    data = outputs.get("data") if isinstance(outputs, dict) else None
    if not isinstance(data, dict):
        raise RunFolderError(f"{path} is damaged")
    return {name: str(digest) for name, digest in data.items() if name.startswith("heldout")}


def _labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that tell the runs apart: their configs', else their folders', else the paths of these."""
    for choice in (lambda run: run["name"], lambda run: Path(run["folder"]).name, lambda run: run["folder"]):
        labels = [str(choice(run)) for run in runs]
        if len(set(labels)) == len(labels):
            break
    return labels


def _mark_unlike(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set each run's `unlike`, the kinds of figures that it measured otherwise than the first; returns what differs."""
    found = []
    for kind in dict.fromkeys(_KINDS.values()):
        having = [run for run in runs if run["settings"].get(kind) is not None]
        for run in having[1:]:
            own, first = run["settings"][kind], having[0]["settings"][kind]
            settings = [
                {"name": name, "value": own.get(name), "first": first.get(name)}
                for name in {**first, **own}
                if own.get(name) != first.get(name)
            ]
            if settings:
                run["unlike"].append(kind)
                found.append(
                    {"figures": kind, "run": run["label"], "first_run": having[0]["label"], "settings": settings}
                )
    return found


def _models(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each evaluated model; one that several runs share, to the last digit of its quality, has one row."""
    rows: list[dict[str, Any]] = []
    known: list[tuple[Any, dict[str, Any]]] = []
    for run in runs:
        for name, model in ((run["evaluation"] or {}).get("models") or {}).items():
            content = (name, model["quality"], model.get("size"), "quality" in run["unlike"])
            if (row := next((row for same, row in known if same == content), None)) is None:
                row = {
                    "runs": [],
                    "name": name,
                    "title": model_title(name),
                    "unlike": run["unlike"],
                    "trained_tokens": run["trained_tokens"]
                    if name not in (TEACHER, CORRECTED, PRUNED, START)
                    else None,
                    "figures": _figures(run, name, model),
                    "bias": _bias_figures(run, name),
                }
                known.append((content, row))
                rows.append(row)
            elif not row["unlike"] and not run["unlike"]:  # what one run has measured of it and another has not
                row["figures"] = _figures(run, name, model) | row["figures"]
                row["bias"] = row["bias"] or _bias_figures(run, name)
            row["runs"].append(run["label"])
    for row in rows:
        everywhere = len(row["runs"]) == sum(run["evaluation"] is not None for run in runs)
        row["run"] = "all" if everywhere and len(row["runs"]) > 1 else ", ".join(row["runs"])
    return rows


def _all_figures() -> dict[str, Figure]:
    figures = {figure.key: figure for figure in FIGURES} | {_ACCURACY.key: _ACCURACY}
    return {key: figures[key] for key in _SHOWN}


def _figures(run: Mapping[str, Any], name: str, model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Value, texts and standard error of every figure that the model has."""
    mean = next((cells[name] for cells in _task_cells(run) if name in cells), None)
    accuracy = {} if mean is None else {"accuracy": mean["value"]}
    found = {}
    for key, figure in _all_figures().items():
        section = accuracy if figure is _ACCURACY else model.get(figure.section) or {}
        if (value := section.get(key)) is None:
            continue
        error = section.get(figure.error) if figure.error else None
        text = None if error is None else written_error(error, value, figure.form)
        if figure is _ACCURACY and mean is not None:
            text = mean["error_text"]
        found[key] = {"value": value, "text": written(value, figure.form), "error_text": text}
    return found


def _bias_figures(run: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The figure with a verdict of every measure of bias that the model has, by measure, figure and ideal."""
    found = {}
    for measure in run["bias"]["measures"] if run["bias"] else []:
        for row in measure["rows"]:
            if row["headline"] and name in row["cells"]:
                found[f"{measure['title']}: {row['title']}"] = row["cells"][name]
    return found


def _task_cells(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of the mean over tasks, or of the only task."""
    return [run["tasks"]["rows"][-1]["cells"]] if run["tasks"] and run["tasks"]["rows"] else []


def _columns(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures that any model has: title, direction, kind, and the rows that are best among those measured alike."""
    columns = []
    for key, figure in _all_figures().items():
        kind = _KINDS.get(figure.section)
        values = {
            index: model["figures"][key]
            for index, model in enumerate(models)
            if key in model["figures"] and kind not in model["unlike"]
        }
        if not any(key in model["figures"] for model in models):
            continue
        # the teacher is what the others are compared with
        students = {index: cell for index, cell in values.items() if models[index]["name"] != TEACHER}
        best: list[int] = []
        if len(students) > 1:
            chosen = (min if figure.better == "lower" else max)(cell["value"] for cell in students.values())
            text = next(cell["text"] for cell in students.values() if cell["value"] == chosen)
            best = [index for index, cell in students.items() if cell["text"] == text]
        columns.append(
            {
                "key": key,
                "title": _SHOWN[key],
                "better": figure.better,
                "kind": kind,
                "best": best if len(best) < len(students) else [],
            }
        )
    return columns


def _points(models: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of the plots: models without the figures that their run measured otherwise than the first."""
    found = []
    for model in models:
        allowed = {
            column: cell["value"]
            for column, cell in model["figures"].items()
            if _KINDS.get(_all_figures()[column].section) not in model["unlike"]
        }
        (point,) = points_of(
            {
                "models": {
                    model["name"]: {
                        "quality": {"perplexity": allowed.get("perplexity")},
                        "size": {"weight_bytes": allowed.get("weight_bytes")},
                        "efficiency": {"decode_tokens_per_second": allowed.get("decode_tokens_per_second")},
                    }
                }
            },
            {model["name"]: allowed["accuracy"]} if "accuracy" in allowed else None,
            run="" if model["run"] == "all" else model["run"],
        )
        found.append(point)
    return found
