"""Questions with right answers that masked candidates are compared by: `prune.search.score: task`.

Where they come from and how they are judged is the caller's: pruning knows tokens to read, tokens to score, and that
every task gives each item a score and a margin. All candidates answer the same items, so what counts is the difference
on each of them, whose error is far smaller than that of either score.

S positions of a batch · N scored tokens · A answers · I items of a task
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdscale.prune.candidates import TaskScore

Floats = NDArray[np.float64]


class ItemScores(Protocol):
    """One model on one task, fp64 [I]: `scores` from 0 to 1; `margins`, by how much the right answer is likelier."""

    @property
    def scores(self) -> Floats: ...

    @property
    def margins(self) -> Floats | None: ...


Judge = Callable[[Floats], Mapping[str, ItemScores]]  # log-likelihoods [A] → what that model scores, by task


@dataclass(frozen=True)
class QuestionBatch:
    """Texts one after another in one row; positions restart with each.

    After each of the positions `places_N` the token `labels_N` is scored, for the answer `answers_N`; one position may
    be there several times.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    places_N: Tensor
    labels_N: Tensor
    answers_N: Tensor


@dataclass(frozen=True)
class Questions:
    """What is read, how many answers are scored, and what their log-likelihoods are worth."""

    batches: Sequence[QuestionBatch]
    answers: int
    judge: Judge

    def compare(self, teacher: Floats, candidates: Sequence[Floats]) -> list[TaskScore]:
        """The score of each candidate, from log-likelihoods [A]."""
        reference = self.judge(teacher)
        judged = [self.judge(values) for values in candidates]
        scales = {task: _scale(scores) for task, scores in reference.items()}
        worth = [{task: _worth(scores, scales[task]) for task, scores in one.items()} for one in judged]
        best = max(worth, key=_mean)
        out = []
        for scores, values in zip(judged, worth, strict=True):
            accuracies = {task: np.asarray(one.scores) for task, one in scores.items()}
            behind = {task: best[task] - values[task] for task in values}
            out.append(
                TaskScore(
                    score=_mean(values), score_error=_error(values),
                    accuracy=_mean(accuracies), accuracy_error=_error(accuracies),
                    behind=_mean(behind), behind_error=_error(behind),
                    teacher_score=_mean({task: _worth(one, scales[task]) for task, one in reference.items()}),
                    teacher_accuracy=_mean({task: one.scores for task, one in reference.items()}),
                    items=sum(map(len, values.values())),
                )
            )  # fmt: skip
        return out


def _scale(teacher: ItemScores) -> float:
    """The spread of the teacher's margins: they are nats in one task and nats a character in another."""
    assert teacher.margins is not None, "tasks without choices are refused"
    return float(np.std(teacher.margins)) or 1.0


def _worth(scores: ItemScores, scale: float) -> Floats:
    """What each item counts: σ(margin / scale), from 0 to 1, where 0.5 is indifference.

    Right or wrong alone would forget by how much, and the margin itself would let a few items decide that are far from
    both: docs/explanation/measured-pruning.md.
    """
    assert scores.margins is not None
    counts: Floats = np.exp(-np.logaddexp(0.0, -np.asarray(scores.margins) / scale))
    return counts


def _mean(by_task: Mapping[str, Floats]) -> float:
    return float(np.mean([values.mean() for values in by_task.values()]))


def _error(by_task: Mapping[str, Floats]) -> float:
    """The standard error of `_mean`, as of items drawn independently within each task."""
    squares = [values.var(ddof=1) / len(values) if len(values) > 1 else 0.0 for values in by_task.values()]
    return float(np.sqrt(np.sum(squares)) / len(squares))
