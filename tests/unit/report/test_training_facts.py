"""Curves of the training log, whatever its columns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.distill.objectives import OBJECTIVES
from kdscale.report import training_facts
from kdscale.report.training_facts import curves
from kdscale.report.training_plots import terms


def rows(**columns: float) -> list[dict[str, Any]]:
    shared = {"tokens_per_second": 10.0, "skipped": 0}
    train = [{"kind": "train", "step": s, "tokens": 8 * s, "loss": 1 / s, **columns, **shared} for s in range(1, 1001)]
    return [*train, {"kind": "validation", "step": 1000, "tokens": 5, "loss": 0.5, "perplexity": 2.0, **columns}]


def test_every_term_of_an_objective_has_a_curve_under_the_objective_s_title() -> None:
    objective = next(iter(OBJECTIVES.values()))
    names = [term.name for term in objective.terms]
    log = curves(rows(**dict.fromkeys(names, 0.25)))
    assert [term["name"] for term in log["terms"]] == names
    assert [term["title"] for term in log["terms"]] == [term.title for term in objective.terms]
    plot = terms({"curves": log})
    assert plot is not None
    assert all(term.title in plot.alt for term in objective.terms)


def test_an_unknown_column_keeps_its_name_and_long_logs_are_thinned() -> None:
    (term,) = curves(rows(layer_gap=3.0))["terms"]
    assert (term["title"], term["unit"]) == ("layer gap", "")
    assert len(term["train"]) == 240
    assert term["train"][-1] == (1000, pytest.approx(3.0))
    assert term["validation"] == [(1000, 3.0)]


def test_values_that_are_not_finite_are_left_out() -> None:
    log = curves([*rows(), {**rows(ce=math.nan)[0], "step": 1001, "tokens": 8008}, {**rows(ce=1.0)[-1], "step": 1001}])
    assert [term["train"] for term in log["terms"]] == [[]]
    assert log["validation"][-1]["tokens"] == 8008


def written_line(**changes: Any) -> str:
    record = {
        "key": "00", "weights_of_step": 4, "step": 5, "sequence": 9, "slot": 0, "prompt": "Once", "text": " upon",
        "ended": True, "prompt_tokens": 1, "answer_tokens": 2, "ids": [1, 2], "mean_entropy": 1.5,
    }  # fmt: skip
    return json.dumps({**record, **changes}) + "\n"


def test_what_the_student_wrote_is_counted_by_round_and_shown_without_control_characters(tmp_path: Path) -> None:
    assert training_facts.written(tmp_path) is None
    lines = [
        written_line(), written_line(slot=1, ended=False, answer_tokens=6, mean_entropy=0.5, text="\x1b[2J<b>"),
        written_line(weights_of_step=8, sequence=40, prompt="x" * 5000),
    ]  # fmt: skip
    broken = ["\n", "{", "[1]\n", "9" * 5000 + "\n", written_line(text=None), written_line(answer_tokens=-1), "{}\n"]
    (tmp_path / "rank-0.jsonl").write_text("".join(lines + broken) + '{"weights_of_st')
    (tmp_path / "rank-1.jsonl").write_bytes(b"\xff\xfe\n" + b"[" * 100_000 + b"\n")
    facts = training_facts.written(tmp_path)
    assert facts is not None and (facts["texts"], facts["tokens"], facts["rounds"]) == (3, "10", 2)
    first, last = facts["by_round"]
    assert first == {"step": 4, "texts": 2, "median_tokens": 6, "longest": 6, "ended": 0.5, "entropy": 1.0}
    assert last["step"] == 8
    shown = [sample["text"] for sample in facts["samples"]]
    assert shown == [" upon", "\\x1b[2J<b>", " upon"] and len(facts["samples"][-1]["prompt"]) == 601


def test_of_a_long_journal_the_beginning_and_the_end_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [written_line(weights_of_step=number) for number in range(100)]
    (tmp_path / "rank-0.jsonl").write_text("".join(lines))
    monkeypatch.setattr(training_facts, "_MOST_BYTES", 10 * len(lines[50]))
    facts = training_facts.written(tmp_path)
    assert facts is not None and facts["in_part"] and 8 <= facts["rounds"] <= 12
    assert (facts["by_round"][0]["step"], facts["by_round"][-1]["step"]) == (0, 99)
