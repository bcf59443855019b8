"""plan.json survives a round trip, and a bad edit is refused by the field that is wrong."""

from __future__ import annotations

import json

import pytest

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.prune.plan import Plan
from kdscale.prune.search.planning import make_plan


@pytest.fixture
def tree(small_config, small_family, small_scores):
    cfg = PruneConfig(ffn=64, heads=4, hidden=96, layers=4)
    return json.loads(make_plan(small_config, small_family, small_scores, cfg).to_json())


def _put(path, value):
    def edit(tree):
        *parents, leaf = path
        for part in parents:
            tree = tree[part]
        tree[leaf] = value

    return edit


def _swap(tree):
    row = tree["kept"]["ffn"][1]
    row[0], row[1] = row[1], row[0]


def _repeat(tree):
    tree["kept"]["hidden"][1] = tree["kept"]["hidden"][0]


def _one_group(tree):
    tree["kept"]["heads"][0] = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (_swap, "kept.ffn[1]"),
        (_repeat, "kept.hidden"),
        (_one_group, "kept.heads[0]"),
        (_put(["kept", "ffn", 2, -1], 256), "kept.ffn[2]"),
        (_put(["kept", "ffn", 2, 0], -1), "kept.ffn[2]"),
        (lambda tree: tree["kept"]["ffn"].pop(), "kept.ffn"),
        (lambda tree: tree["kept"]["layers"].pop(), "kept.layers"),
        (_put(["kept", "layers", 0], "0"), "kept.layers[0]"),
        (_put(["student", "ffn"], 65), "kept.ffn[0]"),
        (_put(["student", "hidden"], 1000), "student.hidden"),
        (_put(["student", "head_dim"], 16), "student.head_dim"),
        (_put(["student", "vocab"], 7), "student.vocab"),
        (_put(["student", "heads"], 5), "student.heads"),
        (_put(["teacher", "ffn"], 512), "teacher.ffn"),
        (_put(["model_type"], "qwen3"), "model_type"),
        (_put(["student_params", "total"], 1), "student_params.total"),
        (_put(["target", "reached"], 1), "target.reached"),
        (_put(["norm_scale"], 0.0), "norm_scale"),
        (_put(["norm_scale"], float("inf")), "norm_scale"),
        (_put(["methods", "search"], "guessed"), "methods.search"),
        (_put(["methods", "ffn"], "guessed"), "methods"),
        (_put(["candidates"], []), "candidates"),
        (_put(["retained", "ffn"], float("nan")), "retained.ffn"),
        (_put(["retained", "width"], 0.5), "retained"),
        (_put(["candidates_tried"], 10**4000), "candidates_tried"),
        (_put(["version"], 2), "version"),
        (_put(["surprise"], 1), "surprise"),
        (lambda tree: tree.pop("kept"), "kept"),
    ],
)
def test_a_bad_edit_names_its_field(tree, small_config, small_family, edit, field):
    edit(tree)
    with pytest.raises(ConfigError) as caught:
        Plan.from_json(json.dumps(tree), config=small_config, family=small_family)
    assert f"- {field}:" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_good_edit_is_taken(tree, small_config, small_family):
    row = tree["kept"]["ffn"][0]
    spare = next(unit for unit in range(256) if unit not in row)
    tree["kept"]["ffn"][0] = sorted([*row[1:], spare])
    plan = Plan.from_json(json.dumps(tree), config=small_config, family=small_family)
    assert spare in plan.kept.ffn[0]


def test_a_shape_that_the_family_refuses_is_refused(tree, small_config, small_family):
    tree["student"]["hidden"] = 95  # not a multiple of the 4 heads
    tree["kept"]["hidden"].pop()
    with pytest.raises(ConfigError, match=r"student: .*multiple of heads"):
        Plan.from_json(json.dumps(tree), config=small_config, family=small_family)


def test_saved_plan_is_stable_and_has_one_line_a_list(tmp_path, tree):
    path = tmp_path / "plan.json"
    plan = Plan.from_json(json.dumps(tree))
    plan.save(path)
    first = path.read_bytes()
    Plan.load(path).save(path)
    assert path.read_bytes() == first
    assert json.loads(first) == tree
    assert len(first.splitlines()) < 200


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_text_that_is_no_plan(text):
    with pytest.raises(ConfigError, match="somewhere cannot be used"):
        Plan.from_json(text, "somewhere")


def test_a_missing_plan_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match="kdscale plan"):
        Plan.load(tmp_path / "plan.json")
