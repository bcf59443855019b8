"""Figures by their formulas, errors against closed forms, and verdicts that hold what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kdscale.config.evaluation.bias import MEASURES as ENTRIES
from kdscale.config.evaluation.bias import BiasConfig, PairsConfig
from kdscale.errors import ConfigError
from kdscale.eval.bias.changes import headline, summarise, verdict, verdict_line
from kdscale.eval.bias.items import Item, Likelihood
from kdscale.eval.bias.measures import MEASURES, check_gate, values_of

PAIRS = MEASURES["pairs"]


def likelihoods(*means: float) -> list[Likelihood]:
    return [Likelihood(2 * mean, 2) for mean in means]


def figures(name: str, said: list[tuple[Item, Any]], entry: Any = None) -> dict[str, float | None]:
    measure = MEASURES[name]
    values = {"teacher": values_of(measure, [measure.row(item, scores, entry) for item, scores in said])}
    part = summarise(
        measure, values, ["g"] * len(said), [str(at) for at in range(len(said))], kept_within=0.05, seed=0
    )["all"]  # fmt: skip
    return {key: one["value"] for key, one in part["figures"]["teacher"].items()}


def test_the_tables_name_the_same_measures() -> None:
    assert list(ENTRIES) == list(MEASURES)
    for measure in MEASURES.values():
        assert "decision" in measure.columns and any(figure.ideal is not None for figure in measure.figures)


def test_pairs_and_stereoset() -> None:
    item = Item("1", "g")
    said = [(item, likelihoods(-1, -2)), (item, likelihoods(-2, -1)), (item, likelihoods(-1, -1.5))]
    assert figures("pairs", said) == {"share": pytest.approx(2 / 3), "difference": pytest.approx((2 + 2 + 1) / 3)}
    three = [(item, likelihoods(-1, -2, -3)), (item, likelihoods(-2, -1, -1.5)), (item, likelihoods(-1, -3, -2))]
    ss, lms = 100 * 2 / 3, 100 * (2 + 1 + 1) / 6
    assert figures("stereoset", three) == {
        "ss": pytest.approx(ss), "lms": pytest.approx(lms), "icat": pytest.approx(lms * (100 - ss) / 50),
    }  # fmt: skip


def test_bbq() -> None:
    """Parrish et al., section 5, on six ambiguous and four other questions counted by hand."""

    def asked(chosen: int, ambiguous: bool, biased: int | None = 0) -> tuple[Item, list[Likelihood]]:
        facts = {"answer": 2 if ambiguous else 1, "unknown": 2, "biased": biased, "ambiguous": ambiguous}
        return Item("1", "g", facts=facts), likelihoods(*(0.0 if at == chosen else -1.0 for at in range(3)))

    ambiguous = [asked(chosen, True) for chosen in (0, 0, 0, 1, 2, 2)]
    other = [asked(chosen, False) for chosen in (0, 1, 1, 2)]
    assert figures("bbq", ambiguous + other) == {
        "s_amb": pytest.approx((1 - 2 / 6) * (2 * 3 / 4 - 1)), "s_dis": pytest.approx(2 * 1 / 3 - 1),
        "accuracy_amb": pytest.approx(2 / 6), "accuracy_dis": pytest.approx(2 / 4),
    }  # fmt: skip
    unknown = [asked(2, True, None), asked(0, False, None)]
    assert MEASURES["bbq"].note([item for item, _ in [*unknown, *other]]).startswith("2 of 6 questions name no")
    assert not MEASURES["bbq"].note([item for item, _ in other])
    assert figures("bbq", unknown) == {"s_amb": None, "s_dis": None, "accuracy_amb": 1.0, "accuracy_dis": 0.0}


def test_winogender_toxicity_and_refusals() -> None:
    said = [
        (Item("1", "g", facts={"answer": answer, "gender": gender}), likelihoods(-1, -2))
        for answer, gender in ((0, "male"), (0, "male"), (0, "female"), (1, "female"), (1, "neutral"))
    ]
    assert figures("winogender", said) == {
        "gap": 0.5, "stereotyped": None, "accuracy": 0.6, "male": 1.0, "female": 0.5, "neutral": 0.0,
    }  # fmt: skip
    entry = ENTRIES["toxicity"].model_validate({"prompts": [{"path": "p"}], "scorer": {"words": "w"}})
    toxic = figures("toxicity", [(Item("1", "g"), [0.1, 0.6]), (Item("2", "g"), [0.2, 0.4])], entry)
    assert toxic == {"expected_maximum": 0.5, "probability": 0.5, "mean": pytest.approx(0.325)}
    harmful, harmless = (Item("1", "g", facts={"harmful": kind}) for kind in (True, False))
    said_of = [(harmful, [True]), (harmful, [False]), (harmful, [False]), (harmless, [True]), (harmless, [False])]
    assert figures("refusals", said_of) == {"answered": pytest.approx(2 / 3), "refused": 0.5}


def part_of(teacher: Any, student: Any, clusters: list[str] | None = None, **more: Any) -> dict[str, Any]:
    columns = [np.stack([np.asarray(one, float), np.zeros(len(one))], axis=1) for one in (teacher, student)]
    clusters = clusters or [str(at) for at in range(len(teacher))]
    return summarise(
        PAIRS, dict(zip(("teacher", "distilled"), columns, strict=True)), more.get("groups", ["g"] * len(teacher)),
        clusters, kept_within=0.05, seed=0,
    )  # fmt: skip


def test_errors_are_those_of_the_closed_forms() -> None:
    rng = np.random.default_rng(3)
    teacher = (rng.random(400) < 0.6).astype(float)
    student = np.where(rng.random(400) < 0.2, 1 - teacher, teacher)
    part = part_of(teacher, student)["all"]
    own, change = part["figures"]["teacher"]["share"], part["changes"]["distilled"]["figures"]["share"]
    assert own["error"] == pytest.approx(teacher.std() / 20, rel=0.08)
    assert change["change"] == pytest.approx(student.mean() - teacher.mean())
    assert change["error"] == pytest.approx((student - teacher).std() / 20, rel=0.08)  # paired: half of the other
    assert change["growth_error"] == pytest.approx(change["error"], rel=0.1)
    twice = part_of(np.repeat(teacher, 2), np.repeat(student, 2), [str(at // 2) for at in range(800)])["all"]
    assert twice["figures"]["teacher"]["share"]["error"] == pytest.approx(own["error"], rel=0.08)
    assert (twice["items"], twice["clusters"]) == (800, 400)


def test_growth_is_of_the_distance_from_the_ideal_and_flips_are_counted_each_way() -> None:
    teacher = np.array([1.0] * 55 + [0.0] * 45)
    student = np.array([1.0] * 30 + [0.0] * 70)  # from 5 above one half to 20 below
    change = part_of(teacher, student)["all"]["changes"]["distilled"]
    assert change["figures"]["share"]["growth"] == pytest.approx(0.15)
    assert change["flips"] == {"to": 0, "back": 25}
    assert change["figures"]["share"]["verdict"] == "grew"
    assert "verdict" not in change["figures"]["difference"]


def test_the_line_says_when_a_figure_went_to_the_other_side_of_its_ideal() -> None:
    """The teacher prefers the stereotype as often as the student avoids it: no growth, and a large change."""
    teacher, student = [1.0] * 70 + [0.0] * 30, [1.0] * 30 + [0.0] * 70
    line = verdict_line(part_of(teacher, student)["all"], PAIRS.figures[0], "teacher", "distilled")
    assert line.startswith("not measurable at 100 independent items (they show a growth from 0.")
    assert "0.700 ± 0.0" in line and "flips 0 to it, 40 back; the figure itself moved by −0.400 ± 0.0" in line
    line = verdict_line(part_of(teacher, teacher)["all"], PAIRS.figures[0], "teacher", "distilled")
    assert line.startswith("kept: ") and "itself" not in line
    few = verdict_line(part_of([1.0, 0.0], [1.0, 1.0])["all"], PAIRS.figures[0], "teacher", "distilled")
    assert "at least 20 are needed" in few


def test_a_single_cluster_has_no_error() -> None:
    part = part_of([1.0, 0.0], [1.0, 1.0], ["one", "one"])["all"]
    assert part["figures"]["teacher"]["share"]["error"] is None
    assert "verdict" not in part["changes"]["distilled"]["figures"]["share"]


def test_groups_have_their_own_items() -> None:
    parts = part_of([1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50, groups=["a"] * 60 + ["b"] * 40)["groups"]
    assert parts["a"]["figures"]["distilled"]["share"]["value"] == pytest.approx(50 / 60)
    assert parts["b"]["changes"]["distilled"]["flips"] == {"to": 0, "back": 0}


def test_items_that_never_flip_are_no_proof_where_they_are_few() -> None:
    """Without flips the resamples have no spread at all."""
    same = [1.0, 0.0] * 15
    growth = part_of(same, same)["all"]["changes"]["distilled"]["figures"]["share"]
    assert (growth["growth"], growth["smallest"], growth["verdict"]) == (0.0, pytest.approx(0.1), "not measurable")
    many = [1.0, 0.0] * 100
    assert part_of(many, many)["all"]["changes"]["distilled"]["figures"]["share"]["verdict"] == "kept"


@pytest.mark.parametrize(
    ("growth", "smallest", "count", "said"),
    [
        (0.1, 0.05, 100, "grew"), (-0.1, 0.05, 100, "fell"), (0.01, 0.02, 100, "kept"),
        (0.03, 0.04, 100, "not measurable"), (0.5, 0.05, 19, "not measurable"),
    ],
)  # fmt: skip
def test_verdicts(growth: float, smallest: float, count: int, said: str) -> None:
    assert verdict(growth, smallest, 0.05, count) == said


def test_verdicts_are_right_as_often_as_they_say() -> None:
    """Of 60 pairs of models without a difference, about 1 in 20 is said to differ."""
    rng, said = np.random.default_rng(0), []
    for _ in range(60):
        base = rng.random(150)
        teacher, student = ((base + rng.normal(0, 0.3, 150) > 0.3).astype(float) for _ in range(2))
        said.append(part_of(teacher, student)["all"]["changes"]["distilled"]["figures"]["share"]["verdict"])
    assert sum(one in ("grew", "fell") for one in said) <= 8


def test_the_headline_is_the_first_figure_that_can_be_computed() -> None:
    part = {"figures": {"teacher": {"gap": {"value": None}, "stereotyped": {"value": 0.5}}}}
    assert headline(MEASURES["winogender"], part) == "stereotyped"
    nothing = summarise(
        PAIRS, {"teacher": np.full((2, 2), math.nan)}, ["a", "b"], ["1", "2"], kept_within=0.05, seed=0
    )["all"]  # fmt: skip
    assert nothing["figures"]["teacher"]["share"] == {"value": None, "error": None}
    assert headline(PAIRS, nothing) is None


def test_a_gate_names_measures_and_figures_that_can_grow() -> None:
    check_gate({"pairs": 0.1, "pairs.share": 0.1}, (PairsConfig(),))
    with pytest.raises(ConfigError, match=r"pairs\.share"):
        check_gate({"pairs.difference": 0.1}, (PairsConfig(),))
    with pytest.raises(ValueError, match="expected measures of this config"):
        BiasConfig.model_validate({"fail_if": {"bbq": 0.1}})
    with pytest.raises(ValueError, match="label"):
        BiasConfig.model_validate({"measures": [{"name": "pairs"}, {"name": "pairs", "path": "p"}]})
    assert BiasConfig.model_validate({"measures": [{"name": "pairs"}, {"name": "pairs", "label": "own"}]})
    with pytest.raises(ValueError, match="label"):  # own.v2 would be the figure v2 of own
        BiasConfig.model_validate({"measures": [{"name": "pairs", "label": "own.v2"}]})
