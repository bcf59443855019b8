"""A tiny task of our own in lm-evaluation-harness's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_TASK = """task: {name}
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

TaskMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def task_maker(tmp_path_factory: pytest.TempPathFactory) -> TaskMaker:
    """Writes a task with `items` two-choice questions, and `more` lines in its YAML; returns the YAML file."""

    def make(name: str = "toy", items: int = 6, more: str = "") -> Path:
        folder = tmp_path_factory.mktemp("tasks")
        rows: list[dict[str, Any]] = [
            {"question": f"the river ran past {'an old mill' * (1 + i % 3)}",
             "choices": [["and the children", "of barley"], ["by name while", "fell"]][i % 2], "label": i % 2}
            for i in range(items)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name) + more)
        return folder / f"{name}.yaml"

    return make
