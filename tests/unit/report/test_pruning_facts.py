"""The report shows the same quantity that ranks: energies, by the unit that is written beside the scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdscale.errors import CheckpointError
from kdscale.report.importance_plots import importance as importance_plots
from kdscale.report.pruning_facts import cumulative, importance
from kdscale.runs.importance_scores import ImportanceScores, load_scores, write_scores

EXPERTS = {"experts.output_norm": np.array([[3.0, 1.0, 2.0], [0.5, 1.0, 2.0]], dtype=np.float32)}


def test_a_norm_is_squared_as_in_the_ranking(tmp_path):
    write_scores(tmp_path, ImportanceScores(EXPERTS), {})
    shown = importance(tmp_path)["scores"]["experts.output_norm"]
    assert shown == [[9.0, 1.0, 4.0], [0.25, 1.0, 4.0]]
    assert load_scores(tmp_path).energy("experts.output_norm").tolist() == shown


def test_the_unit_in_the_file_decides(tmp_path):
    scores = ImportanceScores({"heads.toy": np.array([[3.0, 1.0]])}, {"heads.toy": "norm"})
    write_scores(tmp_path, scores, {})
    facts = importance(tmp_path)
    assert facts["scores"] == {"heads.toy": [[9.0, 1.0]]}
    plan = {"kept": {"layers": [0]}, "methods": {"heads": "toy"}, "retained": {"heads": 0.9}}
    plan |= {"student": {"heads": 1}, "teacher": {"heads": 2}}
    assert cumulative(plan, facts)["heads"]["mean"] == [0.0, 0.9, 1.0]


def test_what_has_no_unit_is_no_score(tmp_path):
    arrays = EXPERTS | {"ffn.expert_tokens": np.ones((2, 3)), "hidden.rotation": np.eye(4)}
    write_scores(tmp_path, ImportanceScores(arrays), {})
    assert list(importance(tmp_path)["scores"]) == ["experts.output_norm"]


def test_scores_without_units_are_refused(tmp_path):
    write_scores(tmp_path, ImportanceScores(EXPERTS), {})
    summary = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "units"}))
    with pytest.raises(CheckpointError, match="no units"):
        importance(tmp_path)
    (tmp_path / "scores.json").unlink()
    assert importance(tmp_path) is None


@pytest.mark.parametrize(
    ("method", "values", "says"),
    [
        ("angular", np.triu(np.arange(12.0).reshape(3, 4), 1), "turns the stream"),
        ("one_by_one", np.array([0.9, 0.1, 2.0]), "nats of KL"),
        ("block_influence", np.array([0.9, 0.1, 2.0]), "changes the stream"),
    ],
)
def test_layers_are_drawn_whatever_scored_them(method, values, says):
    scores = {f"layers.{method}": values.tolist()}
    facts = {"importance": {"scores": scores}, "plan": {"methods": {"layers": method}}, "kept": {"layers": [0, 2]}}
    (plot,) = importance_plots(facts)
    assert says in plot.caption
    assert "Dropped: 1." in plot.caption
