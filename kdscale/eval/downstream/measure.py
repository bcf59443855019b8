"""Tasks over the models of a run: scores that survive a kill, and what downstream.json says of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdscale.eval.downstream.harness import PreparedTask, ScoreSettings, TaskScores, score
from kdscale.eval.downstream.paired import Mean, difference, difference_over_tasks, mean_of, mean_over_tasks
from kdscale.files import read_own_json, write_json
from kdscale.models.loading import load_model, load_tokenizer
from kdscale.runs.folder import fits
from kdscale.runs.models import DISTILLED, TEACHER, before_learning, is_quantized
from kdscale.runtime.device import release_memory
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import is_writer, on_main

SCHEMA_VERSION = 1
MEAN = "mean"
_Scores = Mapping[str, TaskScores]


@dataclass(frozen=True)
class Bench:
    """The prepared tasks and how models are loaded; `kept`: a folder with what is scored, which a killed try left."""

    tasks: Sequence[PreparedTask]
    settings: ScoreSettings
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool
    kept: Path
    reporter: Reporter

    def has(self, name: str) -> bool:
        """Whether all scores of this model are kept. A collective call."""
        return bool(on_main(lambda: all(self._read(name, task) is not None for task in self.tasks)))

    def scores(self, name: str, folder: Path) -> dict[str, TaskScores]:
        """What the model in `folder` scores on every task; what is kept is not asked again. A collective call."""
        known = on_main(lambda: {task.name: self._read(name, task) for task in self.tasks})
        missing = [task for task in self.tasks if known[task.name] is None]
        if missing:
            model = load_model(folder, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
            tokenizer = load_tokenizer(folder, self.trust_remote_code)
            total, left = (sum(task.requests for task in tasks) for tasks in (self.tasks, missing))
            with self.reporter.bar(f"ask {name}", total, "question", done=total - left) as bar:
                for task in missing:
                    known[task.name] = to_json(score(model, tokenizer, [task], self.settings, bar)[task.name])
                    if is_writer():
                        write_json(self._file(name, task), known[task.name])
            del model
            release_memory()
        return {task.name: from_json(known[task.name]) for task in self.tasks}

    def _file(self, name: str, task: PreparedTask) -> Path:
        digest = hashlib.sha256(f"{name}/{task.name}".encode()).hexdigest()[:16]  # names may be anything
        return self.kept / f"{digest}.json"

    def _read(self, name: str, task: PreparedTask) -> Any:
        return read_own_json(self._file(name, task), is_scores, self.reporter.say)


def to_json(scores: TaskScores) -> dict[str, Any]:
    """Plain values of `scores`."""
    return {
        "task": scores.task, "metric": scores.metric, "ids": list(scores.ids), "scores": scores.scores.tolist(),
        "margins": None if scores.margins is None else scores.margins.tolist(), "chance": scores.chance,
        "num_fewshot": scores.num_fewshot, "available": scores.available,
    }  # fmt: skip


def from_json(value: Mapping[str, Any]) -> TaskScores:
    """The scores of which `to_json` made these values."""
    margins = None if value["margins"] is None else np.array(value["margins"], dtype=np.float64)
    return TaskScores(
        value["task"], value["metric"], tuple(value["ids"]), np.array(value["scores"], dtype=np.float64), margins,
        value["chance"], value["num_fewshot"], value["available"],
    )  # fmt: skip


class _Kept(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    task: str
    metric: str
    ids: list[str] = Field(min_length=1)
    scores: list[float]
    margins: list[float] | None
    chance: float | None
    num_fewshot: int
    available: int

    @model_validator(mode="after")
    def _one_of_each_for_an_item(self) -> _Kept:
        if any(len(values) != len(self.ids) for values in (self.scores, self.margins) if values is not None):
            raise ValueError("expected as many scores as items")
        return self


is_scores = fits(_Kept)  # whether a JSON value is what `to_json` gives


def summary(models: Mapping[str, _Scores], seed: int) -> dict[str, Any]:
    """What downstream.json says of scores on the same items: means, and differences of pairs of models."""
    first = next(iter(models.values()))
    return {
        "tasks": {
            name: {
                "metric": task.metric, "items": len(task.ids), "available": task.available,
                "num_fewshot": task.num_fewshot, "chance": task.chance,
            }
            for name, task in first.items()
        },
        "models": {name: means(scores) for name, scores in models.items()},
        "differences": {
            f"{later}_minus_{earlier}": _differences(models[later], models[earlier], seed)
            for later, earlier in pairs_of(list(models))
        },
    }  # fmt: skip


def means(scores: _Scores) -> dict[str, Any]:
    """One model's mean on each task and over them; the margin is the mean over items."""
    by_task = {name: mean_of(task.scores) for name, task in scores.items()}
    margins = {name: None if task.margins is None else float(task.margins.mean()) for name, task in scores.items()}
    return {
        MEAN: _as_json(mean_over_tasks(list(by_task.values()))),
        "tasks": {name: {**_as_json(mean), "margin": margins[name]} for name, mean in by_task.items()},
    }


def pairs_of(models: Sequence[str]) -> list[tuple[str, str]]:
    """(later, earlier): each model and the teacher, what distilling did to the student, and fewer bits to that."""
    pairs = [(name, TEACHER) for name in models if name != TEACHER]
    before = before_learning(models)
    pairs += [(DISTILLED, before)] if before is not None and DISTILLED in models else []
    return pairs + [(name, DISTILLED) for name in models if is_quantized(name) and DISTILLED in models]


def headline(result: Mapping[str, Any]) -> dict[str, str]:
    """What the terminal and the status show: each model's mean over the tasks."""
    shown = {f"{name} accuracy": _percent(model[MEAN]) for name, model in result["models"].items()}
    limited = any(task["items"] < task["available"] for task in result["tasks"].values())
    return {**shown, **({"items": "a sample"} if limited else {})}


def _percent(mean: Mapping[str, Any]) -> str:
    error = mean["standard_error"]
    return f"{100 * mean['value']:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def _as_json(mean: Mean) -> dict[str, float | None]:
    assert math.isfinite(mean.value)
    return {"value": mean.value, "standard_error": mean.standard_error}


def _differences(later: _Scores, earlier: _Scores, seed: int) -> dict[str, Any]:
    by_task = {name: difference(task.scores, earlier[name].scores, seed) for name, task in later.items()}
    after, before = ({name: task.scores for name, task in side.items()} for side in (later, earlier))
    whole = difference_over_tasks(after, before, seed)
    return {MEAN: whole.as_json(), "tasks": {name: gap.as_json() for name, gap in by_task.items()}}
