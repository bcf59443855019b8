"""Speed as rows of a table: what was measured, what was not and why."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.evaluation.speed import SpeedConfig
from kdscale.eval.speed.figures import cell_figures, model_figures, spread
from kdscale.report.speed.facts import milliseconds, speed

NO_TIME = "eval.speed.seconds did not suffice"


def figures(scale: float, repeats: int = 5, left_out: str | None = NO_TIME) -> dict[str, Any]:
    answers = [
        {"first_token": scale * (1 + index), "gaps": [scale * 0.01] * 4, "joules": 2.0} for index in range(repeats)
    ]
    cells = [cell_figures(1, 128, answers, None), cell_figures(4, 128, [], left_out)]
    growth = [{"batch": 2**index, "tokens_per_second": 10.0 * 2**index, "joules_per_token": 0.5} for index in range(3)]
    loaded = {"dtype": "float32", "device": "cuda", "cuda_graphs": False, "cuda_graphs_refused": "its windows"}
    return model_figures(cells, growth, "memory", 128, SpeedConfig(new_tokens=4)) | loaded


def test_p95_is_the_smallest_time_that_95_percent_do_not_exceed() -> None:
    assert spread([float(value) for value in range(1, 101)])["p95"] == 95
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "p95": 5.0, "measurements": 5}
    assert spread([1.0, 2.0, 3.0, 4.0])["p95"] is None


def test_figures_follow_their_definitions() -> None:
    answers = [
        {"first_token": 0.5, "gaps": [0.1, 0.3], "joules": 3.0},
        {"first_token": 1.0, "gaps": [0.2, 0.2], "joules": 5.0},
    ]
    cell = cell_figures(3, 10, answers, None)
    assert cell["prefill_tokens_per_second"] == pytest.approx((60 + 30) / 2)
    assert cell["decode_tokens_per_second"] == pytest.approx(3 * 2 / 0.4)
    assert cell["joules_per_token"] == pytest.approx(8 / 12)  # 3 sequences, 2 tokens each, twice
    assert cell["first_token_seconds"]["median"] == 0.75 and cell["token_seconds"]["median"] == pytest.approx(0.2)


def test_rows_are_the_sizes_and_the_cells_the_models() -> None:
    evaluation = {
        "models": {
            "teacher": {"efficiency": figures(0.2)},
            "int8": {"efficiency_left_out": "it would be unpacked"},
            "distilled": {"efficiency": figures(0.1, left_out="memory did not suffice")},
        }
    }
    found = speed(evaluation)
    assert found is not None
    titles = [(group["title"], [row["title"] for row in group["rows"]]) for group in found["groups"]]
    assert titles == [
        ("Time to first token", ["1 × 128 tokens"]),
        ("Time between tokens", ["1 × 128 tokens"]),
        ("Tokens per second, of all sequences", ["1 × 128 tokens"]),
        ("Energy per token", ["1 × 128 tokens"]),
        ("Most tokens per second", ["after 128 tokens"]),
    ]
    first = found["groups"][0]["rows"][0]["cells"]
    assert first["teacher"] == {"value": pytest.approx(0.6), "text": "600 ms", "under": "p95 1.00 s"}
    assert list(first) == ["teacher", "distilled"]
    assert found["groups"][-1]["rows"][0]["cells"]["teacher"]["under"] == "4 at once; memory held no more"
    assert found["left_out"] == [
        f"Not measured, as {NO_TIME}: 4 × 128 tokens (teacher).",
        "Not measured, as memory did not suffice: 4 × 128 tokens (distilled).",
    ]
    assert found["models_left_out"] == {"INT8": "it would be unpacked"}
    assert found["cuda_graphs_refused"] == {"Teacher": "its windows", "Distilled": "its windows"}


def test_what_no_model_was_measured_with_is_said_once() -> None:
    found = speed({"models": {name: {"efficiency": figures(0.2)} for name in ("teacher", "pruned")}})
    assert found is not None and found["left_out"] == [f"Not measured, as {NO_TIME}: 4 × 128 tokens."]


def test_a_run_of_an_earlier_version_or_without_speed_has_no_table() -> None:
    assert speed({"models": {"teacher": {"efficiency": {"decode_tokens_per_second": 3.0}}, "pruned": {}}}) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0234, "23.4 ms"), (1.25, "1.25 s"), (0.9996, "1,000 ms"), (61.0, "61.0 s")]
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text
