"""Scores of candidates on tasks: paired with the best on the same items, and the questions that they are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdscale.config.candidate_scores import CANDIDATE_SCORES, candidate_score, score_used
from kdscale.config.prune import PruneConfig
from kdscale.pipeline.candidate_tasks import question_batches
from kdscale.prune.candidates import MaskedScore
from kdscale.prune.search.questions import Questions


@dataclass(frozen=True)
class Answered:
    scores: np.ndarray
    margins: np.ndarray


def judge(values: np.ndarray) -> dict[str, Answered]:
    """Two tasks of three and five items; the margins are the values themselves."""
    parts = {"short": values[:3], "long": values[3:]}
    return {name: Answered((part > 0).astype(float), part) for name, part in parts.items()}


def test_a_difference_on_the_same_items_is_known_better_than_either_score() -> None:
    teacher = np.array([4.0, -1.0, 0.5, 3.0, 2.0, -2.0, 9.0, 1.0])
    first = teacher - np.array([0.3, 0.2, 0.3, 0.2, 0.3, 0.2, 0.3, 0.2])
    second = first - 0.1
    worst, best = Questions([], 8, judge).compare(teacher, [second, first])
    assert best.behind == best.behind_error == 0.0
    assert worst.behind == pytest.approx(best.score - worst.score)
    assert 0 < worst.behind_error < worst.score_error / 10
    assert worst.items == 8
    assert best.accuracy == pytest.approx((2 / 3 + 4 / 5) / 2)
    errors = [np.var([1, 0, 1], ddof=1) / 3, np.var([1, 1, 0, 1, 1], ddof=1) / 5]
    assert best.accuracy_error == pytest.approx(np.sqrt(sum(errors)) / 2)
    assert best.teacher_score > best.score > worst.score


def test_the_score_is_a_probability_with_margins_in_units_of_the_teachers_spread() -> None:
    """Against the formula in fp64, with margins of which exp would overflow, and whatever unit a task has."""
    teacher = np.array([1.0, -1.0, 1.0, 4.0, 2.0, 0.0, 2.0, 2.0])
    values = np.array([1000.0, 0.0, -3.0, -1000.0, 2.0, 1.0, 0.5, -0.5])
    (one,) = Questions([], 8, judge).compare(teacher, [values])
    expected = []
    for part, own in ((values[:3], teacher[:3]), (values[3:], teacher[3:])):
        scaled = part / own.std()
        expected.append(np.mean([1 / (1 + np.exp(-x)) if x > -500 else 0.0 for x in scaled]))
    assert one.score == pytest.approx(np.mean(expected))
    unit = np.array([1.0] * 3 + [0.01] * 5)
    (other,) = Questions([], 8, judge).compare(teacher * unit, [values * unit])
    assert other.score == pytest.approx(one.score)


def test_a_teacher_that_answers_all_alike_does_not_divide_by_zero() -> None:
    (one,) = Questions([], 8, judge).compare(np.ones(8), [np.zeros(8)])
    assert one.score == pytest.approx(0.5)


TEXTS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12)


@given(TEXTS, st.data())
def test_every_token_of_every_answer_is_scored_once_where_it_follows(
    texts: list[tuple[int, ...]], data: st.DataObject
) -> None:
    answers = []
    for number, text in enumerate(texts):
        for _ in range(data.draw(st.integers(1, 3))):
            length = data.draw(st.integers(1, len(text)))
            answers.append((number, (*text[len(text) - length + 1 :], data.draw(st.integers(0, 99)))))
    size = data.draw(st.integers(1, 30))
    batches = question_batches(texts, answers, size)
    read: list[tuple[int, ...]] = []
    scored: dict[int, list[int]] = {}
    for batch in batches:
        ids, positions = batch.input_ids_BS[0].tolist(), batch.position_ids_BS[0].tolist()
        starts = [place for place, position in enumerate(positions) if position == 0]
        assert len(ids) <= size or len(starts) == 1
        ends = [*starts[1:], len(ids)]
        own = [tuple(ids[a:b]) for a, b in zip(starts, ends, strict=True)]
        for place, label, answer in zip(
            *(x.tolist() for x in (batch.places_N, batch.labels_N, batch.answers_N)), strict=True
        ):
            text, tokens = answers[answer]
            done = scored.setdefault(answer, [])
            assert place == ends[text - len(read)] - len(tokens) + len(done)
            done.append(label)
        read += own
    assert read == texts
    assert [tuple(scored[number]) for number in range(len(answers))] == [tokens for _, tokens in answers]


def test_rows_of_the_table_read_what_masked_runs_leave() -> None:
    kl = {"loss": 2.0, "kl": 0.5, "teacher_loss": 1.5, "tokens": 9, "compensate": "none", "acceptance": None}
    kl |= {"task": None}
    figures = dict.fromkeys(("score", "score_error", "accuracy", "accuracy_error", "behind", "behind_error"), 0.25)
    task = {**figures, "teacher_score": 0.5, "teacher_accuracy": 0.5, "items": 3}
    assert MaskedScore.model_validate(kl).model_dump() == kl
    both = MaskedScore.model_validate({**kl, "task": task}).model_dump()
    assert score_used(kl).name == "kl"
    assert score_used(both).name == "task"
    assert [row.value(both) for row in CANDIDATE_SCORES] == [0.5, None, 0.25]
    drafts = [{**kl, "acceptance": share} for share in (0.5, 0.75)]
    assert score_used(drafts[0]).name == "acceptance"
    assert sorted(drafts, key=candidate_score("acceptance").order)[0]["acceptance"] == 0.75
    assert candidate_score("kl").order(both) == 0.5
    assert candidate_score("task").order(both) == -0.25


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"score": "tasks"}, "expected one of kl, acceptance, task"),
        ({"score": "task"}, "needs tasks"),
        ({"tasks": ["builtin"]}, "with score task alone"),
        ({"score": "task", "tasks": ["builtin"], "masked_candidates": 1}, "at least 2"),
        ({"score": "task", "tasks": ["builtin", "builtin"]}, "once, got builtin twice"),
        ({"score": "task", "tasks": ["builtin"], "task_items": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(search: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PruneConfig.model_validate({"target_params": "50%", "search": search})


def test_a_score_that_compares_shapes_needs_a_target() -> None:
    search = {"score": "task", "tasks": ["builtin"]}
    assert PruneConfig.model_validate({"target_params": "50%", "search": search}).search.candidate_score.asks
    with pytest.raises(ValidationError, match="there is none"):
        PruneConfig.model_validate({"ffn": 64, "search": search})
