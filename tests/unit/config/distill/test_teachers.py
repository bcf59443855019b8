"""Several teachers in the config: who teaches which source of text, and which objectives can learn from them."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.distill.settings import DistillConfig
from kdscale.config.distill.targets import SEVERAL, TEXT_ALONE
from kdscale.config.distill.teachers import TeacherEntry, most_at_once, shares
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale_kernels import DIVERGENCES

TWO: list[dict[str, Any]] = [{"name": "own"}, {"name": "big", "path": "teachers/big", "weight": 3.0}]
BY_TAG: list[dict[str, Any]] = [{"name": "own"}, {"name": "coder", "path": "teachers/coder", "tags": ["code"]}]


def config(teachers: list[dict[str, Any]], **distill: Any) -> Config:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    return build_config({**tree, "distill": {"teachers": teachers, **distill}}, "test")


def entries(*fields: dict[str, Any]) -> list[TeacherEntry]:
    return [TeacherEntry(name=f"t{number}", **given) for number, given in enumerate(fields)]


@pytest.mark.parametrize(
    ("teachers", "tag", "expected", "most"),
    [
        (entries({}, {"weight": 3.0}), "books", {"t0": 0.25, "t1": 0.75}, 2),
        (entries({}, {"tags": ("code",)}), "code", {"t1": 1.0}, 1),
        (entries({}, {"tags": ("code",)}), "books", {"t0": 1.0}, 1),
        (entries({"tags": ("code",)}, {"tags": ("code", "maths"), "weight": 4.0}), "code", {"t0": 0.2, "t1": 0.8}, 2),
        (entries({"tags": ("code",)}), "books", {}, 1),
    ],
)
def test_weights_are_in_proportion_among_the_teachers_of_a_source(
    teachers: list[TeacherEntry], tag: str, expected: dict[str, float], most: int
) -> None:
    assert shares(teachers, tag) == pytest.approx(expected)
    assert most_at_once(teachers) == most


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_only_the_forward_kl_learns_from_a_mixture_and_all_learn_from_one_teacher_a_source(divergence: str) -> None:
    objectives = [{"name": "token_divergence", "divergence": divergence}]
    assert config(BY_TAG, objectives=objectives).distill.source is SEVERAL
    if divergence == "forward_kl":
        assert config(TWO, objectives=objectives).distill.source is SEVERAL
        return
    with pytest.raises(ConfigError, match=r"not defined on a mixture of teachers; use divergence: forward_kl, or give"):
        config(TWO, objectives=objectives)


@pytest.mark.parametrize(
    ("teachers", "distill", "message"),
    [
        ([*TWO, {"name": "own"}], {}, "every name once; twice: own"),
        ([{"name": "far", "teacher_placement": "served"}], {}, r"teachers \(far\): .*needs served.urls"),
        ([{"name": "far", "teacher_placement": "endpoint"}], {}, r"teachers \(far\): .*endpoint needs endpoint\."),
        ([{"name": "x", "placement": "replicated"}], {}, "unknown key"),
        ([{"name": "x", "weight": 0}], {}, "greater than 0"),
        (
            [{"name": "far", "teacher_placement": "served", "served": {"urls": ["http://h:1"]}}],
            {"processes": 2, "tensor_parallel": 2},
            "tensor_parallel .2. does not go with teacher_placement: served",
        ),
    ],
)
def test_what_cannot_be_is_refused(teachers: list[dict[str, Any]], distill: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(teachers, **distill)


EMA = {"teacher_placement": "ema"}
LABELS = [{"name": "token_divergence", "ce_weight": 0.5}]


@pytest.mark.parametrize(
    ("teachers", "distill", "message"),
    [
        ([], EMA, "nothing to learn: give ce_weight, or another teacher beside it"),
        ([], {**EMA, "objectives": LABELS, "zero_stage": 3}, "ema does not go with zero_stage: 3"),
        (
            [],
            {**EMA, "objectives": LABELS, "processes": 2, "tensor_parallel": 2},
            "ema does not go with tensor_parallel",
        ),
        (
            [],
            {**EMA, "objectives": [*LABELS, {"name": "hidden_states"}]},
            "ema does not give what the objectives need: hidden states",
        ),
        ([{"name": "a", **EMA, "path": "teachers/big"}], {"objectives": LABELS}, "not a path's"),
        ([{"name": "a", **EMA}, {"name": "b", **EMA}], {"objectives": LABELS}, "one average of the student"),
    ],
)
def test_an_average_that_cannot_teach_is_refused(
    teachers: list[dict[str, Any]], distill: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(teachers, **distill)


def test_who_teaches_decides_where_the_placement_alone_does_not() -> None:
    online, average = (config([], objectives=LABELS, **fields).distill for fields in ({}, EMA))
    assert online.decisive() == config([], objectives=LABELS, teacher_placement="offloaded").distill.decisive()
    assert online.decisive() != average.decisive()
    assert average.followers == [""] and online.followers == []
    slower = config([], objectives=LABELS, **EMA, ema={"decay": 0.99}).distill
    assert slower.decisive() != average.decisive()
    assert config([*TWO, {"name": "average", **EMA}]).distill.followers == ["average"]


def test_each_source_sees_the_settings_of_its_own_teacher() -> None:
    far = {"name": "far", "teacher_placement": "served", "served": {"urls": ["http://h:1"], "timeout": 7.0}}
    cfg = config([*TWO, far]).distill
    assert [one.source.name for one in cfg.by_teacher().values()] == ["online", "online", "served"]
    assert cfg.source_timeout == 7.0
    assert cfg.by_teacher()["far"].served.urls == ("http://h:1",)
    assert config(TWO, objectives=[{"name": "cross_entropy"}]).distill.source is TEXT_ALONE
    assert DistillConfig().by_teacher() == {"": DistillConfig()}


def test_where_a_teacher_is_does_not_decide_and_what_it_counts_does() -> None:
    moved = config([{**TWO[0], "teacher_placement": "offloaded"}, {**TWO[1], "path": "elsewhere/big"}])
    assert moved.distill.decisive() == config(TWO).distill.decisive()
    heavier = config([TWO[0], {**TWO[1], "weight": 4.0}])
    assert heavier.distill.decisive() != config(TWO).distill.decisive()
    assert config(BY_TAG).distill.teachers[1].in_words == "coder (weight 1, for code)"
