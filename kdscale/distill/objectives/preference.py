"""Preferences between two answers to a prompt (DPO, arXiv 2305.18290), with the teacher's own margin as a soft label.

Of a pair the student's margin is m = β·[(log π(y₀) − log π₀(y₀)) − (log π(y₁) − log π₀(y₁))], where π₀ is the student
as it began, or nothing (SimPO, arXiv 2405.14734). The loss is −q·log σ(m − γ) − (1 − q)·log σ(−m − γ). The label q is
the sigmoid of the same margin of the teacher's, so that with equal β the loss is least where the student's margin is
the teacher's; or it says with 0 and 1 which answer the teacher, or the file, takes for the better one.

The log-probability of an answer is a sum over rows that no chunk of logits has all of. So the head is multiplied twice:
once for the log-probabilities, which give each row's factor in the gradient, and once for the gradient itself.

N rows (valid positions), A numbers of answers, P = A/2 pairs, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kdscale.config.distill.objectives import PreferenceConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.label_loss import label_logprobs, label_loss
from kdscale.teacher.source import MicroBatch, most_answers
from kdscale.teacher.targets import LabelTargets, Targets


class _Answers(NamedTuple):
    """Which rows are one answer's: `of_N` its number; how many `tokens_A` it has; whether both of a pair are there."""

    of_N: Tensor
    tokens_A: Tensor
    is_pair_P: Tensor

    @classmethod
    def of(cls, batch: MicroBatch) -> _Answers:
        assert batch.answers_N is not None
        sequences, length = batch.input_ids_BS.shape
        tokens_A = torch.zeros(sequences * most_answers(length), dtype=torch.float64, device=batch.answers_N.device)
        tokens_A.index_add_(0, batch.answers_N, torch.ones_like(batch.answers_N, dtype=torch.float64))
        return cls(batch.answers_N, tokens_A, (tokens_A[0::2] > 0) & (tokens_A[1::2] > 0))

    def sums(self, values_N: Tensor) -> Tensor:
        """Of the values of each answer's rows, [A], fp64."""
        return torch.zeros_like(self.tokens_A).index_add_(0, self.of_N, values_N.double())

    def margins(self, values_N: Tensor, normalised: bool) -> Tensor:
        """By how much the sum (or mean) of the first answer of each pair is larger, [P]; 0 where there is no pair."""
        sums_A = self.sums(values_N)
        sums_A = sums_A / self.tokens_A.clamp_min(1.0) if normalised else sums_A
        return (sums_A[0::2] - sums_A[1::2]) * self.is_pair_P


class Preference:
    """The objective `preference`. Its sums are fp32, without a host sync."""

    def __init__(self, settings: PreferenceConfig):
        self._settings = settings

    def __call__(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(loss summed over pairs, sums of ranking_accuracy, ranking_margin, label_confidence and better_logprob)."""
        settings, answers = self._settings, _Answers.of(batch)
        logprobs_N = label_logprobs(student, batch.labels_N)
        reference_N = _reference(settings, targets.reference, logprobs_N)
        margins_P = settings.beta * answers.margins(logprobs_N - reference_N, settings.length_normalised)
        labels_P = self._labels(answers, targets.label, reference_N)
        leads_P, trails_P = settings.target_margin - margins_P, settings.target_margin + margins_P
        losses_P = labels_P * softplus(leads_P) + (1.0 - labels_P) * softplus(trails_P)
        value = (losses_P * answers.is_pair_P).sum()
        terms = _terms(answers, margins_P, labels_P, logprobs_N)
        if not torch.is_grad_enabled():
            return value.float(), terms
        slopes_P = (1.0 - labels_P) * trails_P.sigmoid() - labels_P * leads_P.sigmoid()  # of the loss by the margin
        factors_N = self._factors(answers, slopes_P)
        loss, _ = label_loss(student, batch.labels_N, lambda logprobs_C, rows: factors_N[rows] * logprobs_C)
        return loss + (value - loss.detach()).to(loss.dtype), terms  # the gradient of one, the value of the other

    def _labels(self, answers: _Answers, teacher: LabelTargets | None, reference_N: Tensor) -> Tensor:
        """The probability [P] that the first answer of each pair is the better one."""
        settings = self._settings
        if settings.labels == "given":
            labels_P = torch.ones_like(answers.tokens_A[0::2])
        else:
            assert teacher is not None
            beta = settings.beta if settings.teacher_beta is None else settings.teacher_beta
            margins_P = beta * answers.margins(teacher.logprobs_N - reference_N, settings.length_normalised)
            labels_P = margins_P.sigmoid() if settings.labels == "teacher" else 0.5 + 0.5 * margins_P.sign()
        return labels_P + settings.smoothing * (1.0 - 2.0 * labels_P)

    def _factors(self, answers: _Answers, slopes_P: Tensor) -> Tensor:
        """What each row's log-probability is multiplied by in the gradient, [N], fp32."""
        of_first_P = self._settings.beta * slopes_P * answers.is_pair_P
        factors_A = torch.stack([of_first_P, -of_first_P], 1).flatten()
        if self._settings.length_normalised:
            factors_A = factors_A / answers.tokens_A.clamp_min(1.0)
        return factors_A[answers.of_N].float()


def _reference(settings: PreferenceConfig, reference: LabelTargets | None, logprobs_N: Tensor) -> Tensor:
    if settings.reference == "none":
        return torch.zeros_like(logprobs_N)
    assert reference is not None
    return reference.logprobs_N


def _terms(answers: _Answers, margins_P: Tensor, labels_P: Tensor, logprobs_N: Tensor) -> Tensor:
    """Sums over pairs, fp32. A margin or a label without a side counts as half right."""
    sides_P = (2.0 * labels_P - 1.0).sign()
    means_A = answers.sums(logprobs_N) / answers.tokens_A.clamp_min(1.0)
    better_P = torch.where(sides_P < 0, means_A[1::2], means_A[0::2])
    figures = (
        0.5 + 0.5 * sides_P * margins_P.sign(), sides_P * margins_P, torch.maximum(labels_P, 1.0 - labels_P), better_P
    )  # fmt: skip
    return torch.stack([(figure_P * answers.is_pair_P).sum() for figure_P in figures]).float()
