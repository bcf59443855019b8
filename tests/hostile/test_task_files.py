"""Tasks that others wrote, their items, and what the stage downstream left, with nasty values and damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kdscale.eval.downstream.harness import ScoreSettings, prepare
from kdscale.eval.downstream.measure import is_scores
from kdscale.files import remove_tree
from kdscale.report.downstream_facts import downstream
from tests.hostile.nasty import VALUES, HostileCases, damages, edited, leaves

TASK: dict[str, Any] = {
    "task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "toy.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "target_delimiter": " ", "num_fewshot": 0,
    "description": "", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [{"name": "none", "filter": [{"function": "take_first"}]}],
    "fewshot_config": {"sampler": "first_n"}, "metadata": {"version": 1},
}  # fmt: skip
ITEM: dict[str, Any] = {"question": "q", "choices": ["a", "b"], "label": 0}
# test_config gives YAML all of them
OF_EACH_KIND = ("null", "true", "minus one", "nan", "text", "nul", "markup", "up", "list", "object of null")
MEAN = {"value": 0.5, "standard_error": 0.1}
GAP = {"value": 0.1, "standard_error": 0.1, "low": -0.1, "high": 0.3, "rose": 2, "fell": 1, "p": 1.0}
RESULT = {
    "tasks": {"toy": {"metric": "acc", "items": 2, "available": 3, "num_fewshot": 0, "chance": 0.5}},
    "models": {name: {"mean": MEAN, "tasks": {"toy": MEAN}} for name in ("teacher", "distilled")},
    "differences": {"distilled_minus_teacher": {"mean": GAP, "tasks": {"toy": GAP}}},
    "curve": [{"step": 1, "tokens": 9, "mean": MEAN}],
}
SCORES = {
    "task": "toy", "metric": "acc", "ids": ["0"], "scores": [1.0], "margins": [0.5], "chance": 0.5, "num_fewshot": 0,
    "available": 1,
}  # fmt: skip


def _text(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # an integer of more digits than Python writes
        return "9" * 5000


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "toy.jsonl").write_text(json.dumps(ITEM))
    return tmp_path / "toy.yaml"


def test_task_files(hostile: HostileCases, task: Path) -> None:
    def read() -> Any:
        return prepare([str(task)], ScoreSettings())

    task.write_text(json.dumps(TASK))  # JSON is YAML
    hostile.run("as it is", read, must="accept")
    for place in leaves(TASK):
        for name in OF_EACH_KIND:
            task.write_text(_text(edited(TASK, place, VALUES[name])))
            hostile.run(f"{'.'.join(map(str, place))} = {name}", read)
    for name, damage in damages():
        remove_tree(task)
        with task.open("w") as stream:
            YAML(typ="safe", pure=True).dump(TASK, stream)
        damage(task)
        hostile.run(f"the task: {name}", read)


def test_items(hostile: HostileCases, task: Path) -> None:
    task.write_text(json.dumps(TASK))
    data = task.with_suffix(".jsonl")

    def read() -> Any:
        return prepare([str(task)], ScoreSettings())

    for place in leaves(ITEM):
        for name, value in VALUES.items():
            data.write_text(f"{json.dumps(ITEM)}\n{_text(edited(ITEM, place, value))}\n")
            hostile.run(f"{'.'.join(map(str, place))} = {name}", read)
    for name, damage in damages():
        remove_tree(data)
        data.write_text(json.dumps(ITEM) * 3)
        damage(data)
        hostile.run(f"the items: {name}", read, must="refuse")


def test_results(hostile: HostileCases, tmp_path: Path) -> None:
    path = tmp_path / "downstream.json"
    for place in leaves(RESULT):
        for name, value in VALUES.items():
            path.write_text(_text(edited(RESULT, place, value)))
            hostile.run(f"{'.'.join(map(str, place))} = {name}", lambda: downstream(tmp_path))
    for place in leaves(SCORES):
        for name, value in VALUES.items():
            changed = edited(SCORES, place, value)
            hostile.run(f"kept {place[0]} = {name}", lambda changed=changed: is_scores(changed), must="accept")
