"""Several runs side by side: what is shared, what cannot be compared, what is missing and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from kdscale.cli.main import make_app
from kdscale.errors import ConfigError, RunFolderError
from kdscale.eval.bias.changes import headline, summarise
from kdscale.eval.bias.measures import MEASURES
from kdscale.report.compare.page import shape_text, write_comparison
from kdscale.report.compare.runs import gather
from kdscale.report.compare.settings import differing_fields

HOSTILE = "<script>alert(1)</script>"
SETTINGS = {"tokens": 1000, "bytes": 4000, "seq_len": 64, "dtype": "float32", "device_name": "a CPU", "threads": 2}


def model(perplexity: float, size: int, speed: float) -> dict[str, Any]:
    quality = {
        "perplexity": perplexity, "perplexity_standard_error": 0.5, "bits_per_byte": 1.0, "kl_to_teacher": 0.5,
        "top1_agreement": 0.5,
    }  # fmt: skip
    efficiency = {"decode_tokens_per_second": speed, "batch": 1, "context": 128, "dtype": "float32"}
    return {"quality": quality, "size": {"parameters": size, "weight_bytes": 2 * size}, "efficiency": efficiency}


def evaluation(distilled: float = 20.0) -> dict[str, Any]:
    models = {
        "teacher": model(10.0, 400, 5.0),
        "pruned": model(40.0, 200, 9.0),
        "distilled": model(distilled, 200, 9.0),
    }
    return {"settings": dict(SETTINGS), "models": models, "differences": {}}


def write_run(folder: Path, measured: dict[str, Any] | None, name: str = "a run", **config: Any) -> Path:
    for inner in ("eval", "logs", "stages"):
        (folder / inner).mkdir(parents=True)
    tree = {"name": name, "run_dir": str(folder), "teacher": {"path": "t"}, "distill": {"tokens": 64, **config}}
    with (folder / "config.yaml").open("w") as stream:
        YAML(typ="safe", pure=True).dump(tree, stream)
    plan = {"student": {"layers": 4, "hidden": 96, "kv_heads": 2, "experts": 0}, "student_params": {"total": 200}}
    (folder / "plan.json").write_text(json.dumps(plan))
    row = {"kind": "train", "step": 3, "tokens": 51_200, "loss": 0.5}
    (folder / "logs" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "status.json").write_text(json.dumps({"stages": {"eval": {"state": "done"}}}))
    if measured is not None:
        (folder / "eval" / "eval.json").write_text(json.dumps(measured))
    return folder


def test_what_runs_share_has_one_row_and_the_best_student_is_marked(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, evaluation(ppl), name, lr=ppl) for name, ppl in (("one", 20.0), ("two", 18.0))]
    facts = write_comparison(runs, tmp_path / "out")
    assert [(row["run"], row["name"]) for row in facts["models"]] == [
        ("all", "teacher"), ("all", "pruned"), ("one", "distilled"), ("two", "distilled"),
    ]  # fmt: skip
    (perplexity,) = (column for column in facts["columns"] if column["key"] == "perplexity")
    assert perplexity["best"] == [3]
    assert facts["unlike"] == []
    assert [row["field"] for row in facts["config"]] == ["distill.lr"]
    assert [run["state"] for run in facts["runs"]] == ["finished", "finished"]
    on_front = {point["label"]: "perplexity/weight_bytes" in point["on_front_of"] for point in facts["points"]}
    assert on_front == {"Teacher": True, "Pruned": False, "one: Distilled": False, "two: Distilled": True}
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == facts
    first = [(tmp_path / "out" / name).read_bytes() for name in ("compare.html", "compare.json")]
    write_comparison(runs, tmp_path / "out")
    assert [(tmp_path / "out" / name).read_bytes() for name in ("compare.html", "compare.json")] == first
    page = first[0].decode()
    assert page.count("<svg") == 4 and "51.2 k tokens" in page and "4 layers · hidden 96 · kv heads 2" in page


@pytest.mark.parametrize(
    ("where", "name", "kind", "left_out"),
    [("settings", "tokens", "quality", "perplexity"), ("settings", "threads", "speed", "decode_tokens_per_second")],
)
def test_what_was_measured_otherwise_is_marked_and_in_no_plot(
    tmp_path: Path, where: str, name: str, kind: str, left_out: str
) -> None:
    other = evaluation(18.0)
    other[where][name] = 9
    runs = [write_run(tmp_path / "one", evaluation(), "one"), write_run(tmp_path / "two", other, "two")]
    facts = write_comparison(runs, tmp_path / "out")
    (item,) = facts["unlike"]
    assert (item["figures"], item["run"], item["first_run"]) == (kind, "two", "one")
    assert item["settings"] == [{"name": name, "value": 9, "first": SETTINGS[name]}]
    rows = {(row["run"], row["name"]): row for row in facts["models"]}
    assert rows["two", "distilled"]["unlike"] == [kind]
    (point,) = (point for point in facts["points"] if point["label"] == "two: Distilled")
    assert point[left_out] is None
    assert "≠" in (tmp_path / "out" / "compare.html").read_text()


def test_drafts_are_alike_on_the_same_machine_with_the_same_lengths(tmp_path: Path) -> None:
    runs = []
    for name, lengths in (("one", [1, 4]), ("two", [1, 4]), ("three", [2])):
        measured = evaluation(20.0 + len(runs))
        draft = {"tokens_per_call": 2.0, "draft_cost": 0.5, "speed_up": 1.0 + len(runs), "draft_lengths": lengths}
        measured["models"]["distilled"]["draft"] = draft
        runs.append(write_run(tmp_path / name, measured, name))
    facts = write_comparison(runs, tmp_path / "out")
    (column,) = (column for column in facts["columns"] if column["key"] == "speed_up")
    shown = {row["run"]: row["figures"]["speed_up"]["text"] for row in facts["models"] if row["name"] == "distilled"}
    assert shown == {"one": "1.000", "two": "2.000", "three": "3.000"}
    assert [facts["models"][index]["run"] for index in column["best"]] == ["two"]
    assert [(item["run"], item["figures"]) for item in facts["unlike"]] == [("three", "drafts")]


def test_text_of_another_content_is_another_text(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, evaluation(), name) for name in ("one", "two")]
    for run, digest in zip(runs, "ab", strict=True):
        manifest = {"outputs": {"data": {"heldout/tokens": digest * 64, "train/tokens": digest}}}
        (run / "stages" / "data.json").write_text(json.dumps(manifest))
    (item,) = gather(runs)["unlike"]
    assert [setting["name"] for setting in item["settings"]] == ["held-out text"]


def test_unfinished_and_damaged_runs_show_what_they_have(tmp_path: Path) -> None:
    whole, early = write_run(tmp_path / "whole", evaluation(), "x"), write_run(tmp_path / "early", None, "x")
    (early / "status.json").write_text(json.dumps({"stages": {"distill": {"state": "interrupted"}}}))
    (early / "logs" / "metrics.jsonl").unlink()
    broken = write_run(tmp_path / "broken", {"models": {"teacher": {"quality": {"perplexity": HOSTILE}}}}, HOSTILE)
    (broken / "plan.json").write_text("{")
    facts = write_comparison([whole, early, broken], tmp_path / "out")
    assert [run["label"] for run in facts["runs"]] == ["whole", "early", "broken"]  # two have one name
    assert [run["state"] for run in facts["runs"]] == [
        "finished", "not finished: distill interrupted", "not finished: the last stage is eval",
    ]  # fmt: skip
    assert facts["runs"][1]["lacks"] == ["training log", "evaluation"]
    damage = facts["runs"][2]["damage"]
    assert len(damage) == 2 and "plan.json" in damage[0] and "eval.json is damaged" in damage[1]
    assert {row["run"] for row in facts["models"]} == {"whole"}
    assert HOSTILE not in (tmp_path / "out" / "compare.html").read_text()


BAD: list[Any] = [
    None, 3, "x", [], {}, {"models": 3}, {"models": {"a": None}}, {"models": {"a": {"quality": []}}},
    {"settings": 3, **{key: value for key, value in evaluation().items() if key != "settings"}},
    {**evaluation(), "models": {"teacher": {**model(1.0, 2, 3.0), "size": 3}}},
    {**evaluation(), "models": {"teacher": {**model(1.0, 2, 3.0), "draft": [2]}}},
    {**evaluation(), "models": {"teacher": {**model(1.0, 2, 3.0), "draft": {"draft_lengths": {}}}}},
    {**evaluation(), "models": {"teacher": {**model(1.0, 2, 3.0), "efficiency": {"decode_tokens_per_second": "x"}}}},
]  # fmt: skip


@pytest.mark.parametrize("content", BAD, ids=lambda content: json.dumps(content)[:40])
def test_any_json_in_the_place_of_an_evaluation_leaves_the_others(tmp_path: Path, content: Any) -> None:
    runs = [
        write_run(tmp_path / "one", evaluation(), "one"),
        write_run(tmp_path / "two", content, "two"),
    ]
    for name, text in (("status.json", "[]"), ("plan.json", json.dumps(content)), ("config.yaml", "teacher: 3")):
        (runs[1] / name).write_text(text)
    (runs[1] / "stages" / "data.json").write_text(json.dumps(content))
    facts = write_comparison(runs, tmp_path / "out")
    assert "one" in {label for row in facts["models"] for label in row["runs"]}


def test_accuracy_stands_beside_perplexity_where_tasks_were_scored(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, evaluation(ppl), name) for name, ppl in (("one", 20.0), ("two", 18.0))]
    mean = {"value": 0.5, "standard_error": 0.05}
    task = {"metric": "acc", "items": 9, "available": 9, "num_fewshot": 0, "chance": 0.5}
    models = {name: {"mean": mean, "tasks": {"cloze": mean}} for name in ("teacher", "distilled")}
    for run in runs:
        (run / "downstream").mkdir()
        result = {"tasks": {"cloze": task}, "models": models, "differences": {}}
        (run / "downstream" / "downstream.json").write_text(json.dumps(result))
    facts = write_comparison(runs, tmp_path / "out")
    (distilled, *_) = (row for row in facts["models"] if row["name"] == "distilled")
    assert distilled["figures"]["accuracy"] == {"value": 0.5, "text": "50.0 %", "error_text": "5.0"}
    assert (tmp_path / "out" / "compare.html").read_text().count("Accuracy over tasks (higher is better)") == 4


@pytest.mark.parametrize(
    ("setting", "available", "differs"), [("seed", 9, False), ("seed", 10, True), ("dtype", 9, True)]
)
def test_tasks_are_alike_where_the_same_items_were_asked_alike(
    tmp_path: Path, setting: str, available: int, differs: bool
) -> None:
    mean = {"value": 0.5, "standard_error": 0.05}
    task = {"metric": "acc", "items": 9, "available": available, "num_fewshot": 0, "chance": 0.5}
    runs = []
    for name in ("one", "two"):
        runs.append(write_run(tmp_path / name, evaluation(), name))
        result = {"tasks": {"cloze": task}, "models": {"teacher": {"mean": mean, "tasks": {"cloze": mean}}},
                  "settings": {setting: name}, "differences": {}}  # fmt: skip
        (runs[-1] / "downstream").mkdir()
        (runs[-1] / "downstream" / "downstream.json").write_text(json.dumps(result))
    found = [setting["name"] for item in gather(runs)["unlike"] for setting in item["settings"]]
    assert found == ([setting] if differs else [])


def test_bias_has_a_table_of_its_own(tmp_path: Path) -> None:
    """Of each measure the figure with a verdict; a measure of another number of items is not comparable."""
    runs = [write_run(tmp_path / name, evaluation(ppl), name) for name, ppl in (("one", 20.0), ("two", 18.0))]
    measure, models = MEASURES["pairs"], ("teacher", "distilled")
    for run, items in zip(runs, (60, 40), strict=True):
        values = {name: np.full((items, len(measure.columns)), 0.5) for name in models}
        for name in models:
            values[name][: items // 4, 0] = 1.0
        summary = summarise(measure, values, ["age"] * items, list(map(str, range(items))), kept_within=0.05, seed=0)
        words = {one.name: {"title": one.title, "ideal": one.ideal, "range": one.range} for one in measure.figures}
        result = {
            "measure": measure.name, "title": measure.title, "paper": measure.paper, "decision": measure.decision,
            "headline": headline(measure, summary["all"]), "verdicts": {}, "figures": words, **summary,
        }  # fmt: skip
        settings = {"limit": items, "seed": items, "dtype": "float32"}
        tree = {"schema_version": 1, "settings": settings, "models": list(models), "measures": {"pairs": result}}
        (run / "bias").mkdir()
        (run / "bias" / "bias.json").write_text(json.dumps(tree))
    facts = write_comparison(runs, tmp_path / "out")
    assert [run["damage"] for run in facts["runs"]] == [[], []]
    (title,) = facts["bias"]
    assert title.startswith("Minimal pairs: ")
    assert {row["run"] for row in facts["models"] if row["bias"]} >= {"one", "two"}
    (item,) = facts["unlike"]
    assert (item["figures"], item["settings"]) == (
        "bias",
        [
            {"name": "Minimal pairs", "value": "40 items", "first": "60 items"},
            {"name": "seed", "value": 40, "first": 60},
        ],
    )
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Bias and safety" in page and "≠" in page


def test_the_command_prints_a_line_for_each_model_and_names_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = evaluation(18.0)
    other["settings"]["seq_len"] = 9
    runs = [write_run(tmp_path / "one", evaluation(), "one"), write_run(tmp_path / "two", other, "two")]
    monkeypatch.setenv("COLUMNS", "100")
    make_app()(["compare", *map(str, runs), "--out", str(tmp_path / "out")], standalone_mode=False)
    text = capsys.readouterr().out
    lines = {tuple(line.split()[:2]) for line in text.splitlines() if line}
    assert {("one", "Distilled"), ("two", "Distilled")} <= lines
    assert "18.0 ≠" in text and "two measured quality otherwise than one: seq_len" in text
    assert str(tmp_path / "out" / "compare.html") in text


def test_names_are_neither_markup_nor_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.yaml is read as it is: what a run is called there may be anything."""
    names = (r"[/x] $\a$", r"[red] $\b$")
    runs = [write_run(tmp_path / str(at), evaluation(18.0 + at), name) for at, name in enumerate(names)]
    make_app()(["compare", *map(str, runs), "--out", str(tmp_path / "out")], standalone_mode=False)
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in names)


def test_runs_that_are_none_are_all_named_before_anything_is_written(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", evaluation(), "one")
    for runs, words in (
        ((one, tmp_path / "x", tmp_path / "y"), r"x[\s\S]*y"),
        ((one, one), "two or more"),
        ((one,), "two"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_app()(["compare", *map(str, runs), "--out", str(tmp_path / "out")], standalone_mode=False)
    with pytest.raises(RunFolderError, match="does not exist"):
        gather([tmp_path / "x"])
    assert not (tmp_path / "out").exists()


def test_fields_that_differ_are_named_down_to_the_entries_of_lists() -> None:
    one = {"name": "a", "distill": {"objectives": [{"name": "kd", "draws": 50}], "lr": 1}, "seed": 1}
    two = {"name": "b", "distill": {"objectives": [{"name": "kd", "draws": 25}], "lr": 1}}
    assert differing_fields({"one": one, "two": two}) == [
        {"field": "distill.objectives.0.draws", "values": {"one": 50, "two": 25}},
        {"field": "seed", "values": {"one": 1, "two": None}},
    ]
    assert shape_text(None) == ""
