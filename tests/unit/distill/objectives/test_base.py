"""Several objectives as one loss: weights, what each is a mean over, the columns of the log."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pytest
import torch

from kdscale.config.distill.objective import ModelPair, ObjectiveConfig, Term
from kdscale.config.distill.objectives import OBJECTIVES, PreferenceConfig, TokenDivergenceConfig
from kdscale.distill.objectives.base import Objectives, StudentOutput
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets


class NormConfig(ObjectiveConfig):
    implementation = f"{__name__}:Norm"
    terms = (Term("largest", "largest value"), Term("odds", "log odds", exponential=Term("odds_ratio", "odds")))
    name: Literal["norm"] = "norm"


class PerSequenceConfig(ObjectiveConfig):
    implementation = f"{__name__}:PerSequence"
    terms = ()
    count: ClassVar[Literal["tokens", "sequences"]] = "sequences"
    name: Literal["per_sequence"] = "per_sequence"


class Norm:
    def __init__(self, settings: NormConfig):
        self.settings = settings

    def __call__(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> Any:
        figures = torch.stack([student.hidden_NH.max(), torch.tensor(0.5) * len(batch.labels_N)])
        return student.hidden_NH.square().sum(), figures.detach()


class PerSequence:
    def __init__(self, settings: PerSequenceConfig):
        self.settings = settings

    def __call__(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> Any:
        return student.hidden_NH.abs().sum(), torch.empty(0)


def computed(objectives: Objectives) -> tuple[Any, torch.Tensor, torch.Tensor]:
    hidden_NH = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
    rows = torch.arange(2)
    batch = MicroBatch(rows[None], rows[None], rows, rows)
    losses, figures = objectives(StudentOutput(hidden_NH, OutputHead(torch.eye(2)), 2), Targets(rows=2), batch)
    return losses, figures, hidden_NH


def test_the_sum_is_weighted_and_each_loss_is_a_mean_over_what_it_counts() -> None:
    objectives = Objectives([NormConfig(weight=0.5), PerSequenceConfig()])
    losses, figures, hidden_NH = computed(objectives)
    assert objectives.columns == ["loss", "norm", "per_sequence", "largest", "odds"]
    # 2 tokens in 4 sequences: dividing by the tokens makes the second loss a mean over sequences
    total = objectives.weighted(losses, objectives.tokens_per(torch.tensor([2, 4])))
    (total / 2).backward()
    means = objectives.means([2.0, 4.0, *figures.tolist()])
    assert means["norm"] == 39 / 2
    assert means["per_sequence"] == 11 / 4
    assert means["loss"] == 0.5 * 39 / 2 + 11 / 4 == float(total.detach()) / 2
    assert (means["largest"], means["odds"], means["odds_ratio"]) == (2.5, 0.5, math.exp(0.5))
    torch.testing.assert_close(hidden_NH.grad, (0.5 * 2 * hidden_NH.detach()) / 2 + 1 / 4)


def test_one_objective_of_weight_one_is_left_as_it_is() -> None:
    objectives = Objectives([NormConfig()])
    (loss,), figures, _ = computed(objectives)
    assert objectives.weighted((loss,), {"sequences": torch.tensor(0.3)}) is loss
    assert objectives.columns == ["loss", "largest", "odds"]
    assert objectives.means([2.0, 1.0, *figures.tolist()])["loss"] == 39 / 2


def test_a_micro_batch_without_rows_has_figures_and_a_graph() -> None:
    objectives = Objectives([NormConfig(), PerSequenceConfig()])
    weight = torch.ones(3, requires_grad=True)
    losses, figures = objectives.of_nothing(weight.sum() * 0.0)
    objectives.weighted(losses, {"sequences": torch.tensor(1.0)}).backward()
    assert weight.grad is not None and not weight.grad.any()
    assert figures.tolist() == [0.0] * objectives.width == [0.0] * 4


def both(is_own: list[bool] | None) -> tuple[Objectives, Any, torch.Tensor]:
    objectives = Objectives([NormConfig()], own=[NormConfig(weight=2.0)])
    hidden_NH = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
    rows = torch.arange(2)
    own_N = None if is_own is None else torch.tensor(is_own)
    batch = MicroBatch(rows[None], rows[None], rows, rows, is_own_N=own_N)
    losses, figures = objectives(StudentOutput(hidden_NH, OutputHead(torch.eye(2)), 2), Targets(rows=2), batch)
    return objectives, losses, figures


def test_what_the_student_wrote_has_objectives_of_its_own() -> None:
    objectives, losses, figures = both([False, True])
    assert objectives.columns == [
        "loss", "largest", "odds", "on_policy_loss", "on_policy_largest", "on_policy_odds"
    ]  # fmt: skip
    assert [float(loss.detach()) for loss in losses] == [5.0, 34.0]
    assert objectives.counts == ("tokens", "sequences", "own_tokens", "own_sequences", "own_pairs")
    means = objectives.means([2.0, 2.0, 1.0, 1.0, 0.0, *figures.tolist()])
    assert (means["largest"], means["on_policy_largest"]) == (2.0, 5.0)
    assert means["on_policy_loss"] == 2.0 * 34.0
    assert means["loss"] == (5.0 + 2.0 * 34.0) / 2 == float(objectives.weighted(losses, {}).detach()) / 2


def test_a_loss_of_pairs_weighs_as_much_as_their_tokens_do() -> None:
    """10 tokens, 6 of them in 2 pairs: the mean over pairs, by 6 / 10."""
    objectives = Objectives([NormConfig()], own=[PreferenceConfig(weight=0.5)], section="preferences")
    assert objectives.columns[3:5] == ["preferences_loss", "preferences_ranking_accuracy"]
    counts = torch.tensor([10, 4, 6, 1, 2])
    total = objectives.weighted(torch.tensor([8.0, 1.4]).unbind(), objectives.tokens_per(counts))
    figures = [8.0, 1.0, 1.0, 1.4, 1.0, 0.6, 1.8, -3.0]
    means = objectives.means([*map(float, counts), *figures])
    assert means["preferences_loss"] == pytest.approx(0.5 * 1.4 / 2)
    assert (means["preferences_ranking_accuracy"], means["preferences_better_logprob"]) == (0.5, -1.5)
    assert means["loss"] == pytest.approx((8.0 + 6 * 0.35) / 10) == pytest.approx(float(total) / 10)
    assert "ranked as labelled on pairs 50.0 %" in objectives.headline(means)


@pytest.mark.parametrize(("is_own", "missing"), [(None, "on_policy_largest"), ([True, True], "largest")])
def test_of_a_kind_that_is_not_there_nothing_is_reported(is_own: list[bool] | None, missing: str) -> None:
    objectives, losses, figures = both(is_own)
    own = [2.0, 2.0, 0.0] if is_own else [0.0, 0.0, 0.0]
    means = objectives.means([2.0, 2.0, *own, *figures.tolist()])
    present = {"largest", "on_policy_largest"} - {missing}
    assert math.isnan(means[missing]) and means[present.pop()] == 5.0 / 2
    assert means["loss"] == pytest.approx(39 / 2 * (2.0 if is_own else 1.0))
    assert "nan" not in objectives.headline(means)
    assert sum(loss.requires_grad for loss in losses) == 1


def test_the_message_after_a_validation_says_what_the_terms_are() -> None:
    objectives = Objectives([TokenDivergenceConfig()])
    means = objectives.means([2.0, 1.0, 2.5, 1.0, 2 * math.log(66.0), 1.9, 0.1, 1.026])
    assert objectives.headline(means) == "loss 1.2500 · perplexity 66.00 · top-1 agreement 51.3 %"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_of_the_table_can_be_made(name: str) -> None:
    models = ModelPair(4, 3, 96, 64, widths=(96, 32, 64, 32))
    settings = OBJECTIVES[name]().settled(models, 10)  # type: ignore[call-arg]
    assert settings.name == name
    assert callable(settings.build(models))
