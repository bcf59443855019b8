"""Task files are data: what names code, or a place outside their folder, is refused with all that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdscale.errors import ConfigError, DataError
from kdscale.eval.downstream.local_tasks import is_local, read_task, task_files

_GOOD = """task: toy
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
"""
_ITEM = '{"question": "q", "choices": ["a", "b"], "label": 0}\n'


def _write(folder: Path, text: str = _GOOD, data: str = _ITEM) -> Path:
    (folder / "toy.yaml").write_text(text)
    (folder / "toy.jsonl").write_text(data)
    return folder / "toy.yaml"


def test_a_task_and_the_data_beside_it(tmp_path: Path) -> None:
    task = read_task(_write(tmp_path))
    assert task.name == "toy"
    assert task.items == {"test": [{"question": "q", "choices": ["a", "b"], "label": 0}]}
    assert task.files == (tmp_path / "toy.yaml", tmp_path / "toy.jsonl")


def test_splits_lists_of_files_csv_and_included_settings(tmp_path: Path) -> None:
    (tmp_path / "_base.yaml").write_text("output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: [x, y]\n")
    (tmp_path / "one.csv").write_text("q,a\n1,x\n")
    (tmp_path / "two.csv").write_text('q,a\n"2, with a comma",y\n')
    (tmp_path / "t.yaml").write_text(
        "include: _base.yaml\ntask: t\ndataset_path: csv\ntest_split: test\nfewshot_split: shots\ndoc_to_target: a\n"
        "dataset_kwargs: {data_files: {test: [one.csv, two.csv], shots: one.csv}}\n"
    )
    task = read_task(tmp_path / "t.yaml")
    assert [item["q"] for item in task.items["test"]] == ["1", "2, with a comma"]
    assert len(task.items["shots"]) == 1
    assert task.settings["doc_to_choice"] == ["x", "y"]
    assert task_files(str(tmp_path)) == [tmp_path / "t.yaml"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("process_docs: !function utils.f\n", "tag"),
        ("process_docs: utils.f\n", "unknown key|left out"),
        ("class: utils.Task\n", "unknown key|left out"),
        ("custom_dataset: utils.f\n", "unknown key|left out"),
        ("unsafe_code: true\n", "unknown key|left out"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate"),
        ("fewshot_config: {process_docs: f}\n", "fewshot_config.process_docs"),
        ("dataset_kwargs: {data_files: {test: ../secret.jsonl}}\n", "outside its folder"),
        ("dataset_kwargs: {data_files: {test: /etc/passwd}}\n", "outside its folder"),
        ("dataset_kwargs: {data_files: {test: link.jsonl}}\n", "outside its folder"),
        ("include: ../other.yaml\n", "outside its folder"),
        ("include: toy.yaml\n", "include each other"),
        ("validation_split: dev\n", "one of test"),
        ("num_fewshots: 3\n", "did you mean 'num_fewshot'"),
        ("num_fewshot: many\n", "num_fewshot"),
    ],
)
def test_refused(tmp_path: Path, change: str, complaint: str) -> None:
    inner = tmp_path / "tasks"
    inner.mkdir()
    (tmp_path / "secret.jsonl").write_text(_ITEM)
    (inner / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ConfigError, match=complaint):
        read_task(_write(inner, _GOOD + change))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("task: t\ndataset_path: hub/name\noutput_type: guess\n", ("dataset_path", "output_type")),
        ("task: t\ndataset_path: json\ntest_split: t\n", ("doc_to_text, doc_to_target",)),
        ("task: t\ndataset_path: json\ndoc_to_text: a\ndoc_to_target: b\n", ("test_split",)),
    ],
)
def test_everything_wrong_is_one_message(tmp_path: Path, text: str, named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        read_task(_write(tmp_path, text))
    assert all(what in str(error.value) for what in named)


@pytest.mark.parametrize("data", ["", "[1]\n", "{broken\n", '{"a": NaN}\n[]\n'])
def test_damaged_items(tmp_path: Path, data: str) -> None:
    with pytest.raises(DataError, match=r"toy\.jsonl"):
        read_task(_write(tmp_path, data=data))


def test_which_names_are_files() -> None:
    assert is_local("builtin")
    assert is_local("builtin:cloze")
    assert is_local("tasks/mine.yaml")
    assert not is_local("arc_easy")
