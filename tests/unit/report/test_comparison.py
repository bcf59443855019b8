"""The side-by-side table: any list of models, in the order of the evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.report.comparison import comparison, students, worsened, written
from kdscale.runs.models import model_title


def rows(**models: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in comparison({"models": models})}


def test_speeds_that_differ_by_noise_are_alike() -> None:
    speeds = {"teacher": 10.0, "pruned": 20.0, "distilled": 19.7}
    models = {
        name: {"efficiency": {"decode_tokens_per_second": v}, "size": {"parameters": v}} for name, v in speeds.items()
    }
    table = rows(**models)
    assert table["decode_tokens_per_second"]["best"] == ["pruned", "distilled"]
    assert table["parameters"]["best"] == ["teacher"]
    assert table["decode_tokens_per_second"]["cells"]["pruned"]["ratio"] == 2.0


def test_the_columns_are_the_models_of_the_evaluation() -> None:
    models = {name: {"size": {"parameters": size}} for name, size in
              {"teacher": 8, "pruned": 4, "distilled": 4, "int4_gptq_g32": 1}.items()}  # fmt: skip
    cells = rows(**models)["parameters"]["cells"]
    assert {name: cell["ratio"] for name, cell in cells.items()} == {
        "teacher": 1.0, "pruned": 0.5, "distilled": 0.5, "int4_gptq_g32": 0.125,
    }  # fmt: skip
    assert list(cells) == list(models)
    assert rows(**models)["parameters"]["best"] == ["int4_gptq_g32"]
    assert students({"models": models}) == ["pruned", "distilled"]
    assert model_title("int4_gptq_g32") == "INT4 GPTQ g32"


def test_sources_are_rows_between_quality_and_size() -> None:
    models = {
        name: {"quality": {"perplexity": 9}, "by_source": {"books": books, "chats": 4.0}, "size": {"parameters": 8}}
        for name, books in {"teacher": 8.0, "pruned": 16.0}.items()
    }
    table = comparison({"models": models})
    assert [(row["group"], row["title"]) for row in table] == [
        ("Quality", "Perplexity"), ("Perplexity by source", "books"), ("Perplexity by source", "chats"),
        ("Size", "Parameters"),
    ]  # fmt: skip
    assert table[1]["best"] == ["teacher"]
    assert table[1]["cells"]["pruned"]["ratio"] == 2.0


def test_without_the_teacher_there_are_no_ratios() -> None:
    table = rows(a={"size": {"parameters": 2}}, b={"size": {"parameters": 3}})
    assert {cell["ratio"] for cell in table["parameters"]["cells"].values()} == {None}


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("count", 134_515_008, "135 M"), ("count", 8_030_261_248, "8.03 B"), ("count", 999_999, "1.00 M"),
        ("size", 23_040, "23.0 kB"), ("size", 269_060_552, "269 MB"), ("number", 23.94, "23.9"),
        ("number", 62_683.2, "62,683"), ("number", 0.01234, "0.0123"), ("percent", 0.512, "51.2 %"),
    ],
)  # fmt: skip
def test_figures_are_written_for_people(form: str, value: float, text: str) -> None:
    assert written(value, form) == text


def test_every_measure_that_got_worse_is_named() -> None:
    """A lower loss hides neither a larger distance to the teacher nor a lower agreement."""
    pruned = {"perplexity": 129.0, "ce": 4.86, "kl_to_teacher": 1.31, "top1_agreement": 0.455, "top1_accuracy": 0.3}
    student = {"perplexity": 101.0, "ce": 4.62, "kl_to_teacher": 1.59, "top1_agreement": 0.366, "top1_accuracy": 0.3}
    models = {name: {"quality": quality} for name, quality in {"pruned": pruned, "distilled": student}.items()}
    assert worsened({"models": models}) == [
        "KL to the teacher 1.310 → 1.590", "Top-1 agreement with the teacher 45.5 % → 36.6 %",
    ]  # fmt: skip
    paired = {"kl_to_teacher": 0.28, "kl_to_teacher_standard_error": 0.139, "top1_agreement": -0.089,
              "top1_agreement_standard_error": 0.06}  # fmt: skip
    measured = {"models": models, "differences": {"distilled_minus_pruned": paired}}
    assert worsened(measured) == ["KL to the teacher 1.310 → 1.590"]  # the other is within two standard errors
    models["distilled"]["quality"]["perplexity"] = 130.0  # judged by the cross-entropy, which it is computed from
    for error, named in ((0.02, True), (0.03, False)):
        paired |= {"ce": 0.05, "ce_standard_error": error}
        assert ("Perplexity 129 → 130" in worsened(measured)) is named
    assert worsened({"models": {"teacher": {"quality": pruned}, "distilled": models["distilled"]}}) == []
