"""Divergence from what the teacher says of the classes of a document, and cross-entropy with its class where known.

With z and t the student's and the teacher's logits of a document's classes, it adds

    α·CE(z, class) + (1 − α)·T²·KL(softmax(t / T) ‖ softmax(z / T))

and the second part alone, with α = 0, where the class is not known. Source: Hinton et al., arXiv 1503.02531.

N rows, one for each document; C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdscale.config.distill.encoder_objectives import ClassificationConfig
from kdscale.config.distill.schedules import at
from kdscale.data.store_format import UNKNOWN_CLASS
from kdscale.distill.objectives.base import StudentOutput
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets


class Classification:
    """The objective `classification`."""

    def __init__(self, settings: ClassificationConfig):
        self._settings = settings

    def __call__(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(summed loss, sums of class_kl and class_agreement)."""
        assert targets.full is not None
        temperature, weight = at(self._settings.temperature, batch.step), at(self._settings.ce_weight, batch.step)
        own_NC = student.head.logits(student.hidden_NH)
        with torch.no_grad():
            teacher_NC = targets.full.head.logits(targets.full.hidden_NG)
        kl_N = temperature**2 * _divergence(own_NC / temperature, teacher_NC / temperature)
        ce_N = F.cross_entropy(own_NC, batch.labels_N.clamp_min(0), reduction="none")
        mixed_N = weight * ce_N + (1.0 - weight) * kl_N
        loss_N = torch.where(batch.labels_N == UNKNOWN_CLASS, kl_N, mixed_N)
        sums = _divergence(own_NC, teacher_NC).sum(), (own_NC.argmax(1) == teacher_NC.argmax(1)).sum()
        return loss_N.sum(), torch.stack([part.detach().float() for part in sums])


def _divergence(own_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """KL of the teacher's distribution to the student's, in nats, [N]."""
    log_own_NC, log_teacher_NC = (torch.log_softmax(logits_NC, 1) for logits_NC in (own_NC, teacher_NC))
    return F.kl_div(log_own_NC, log_teacher_NC, reduction="none", log_target=True).sum(1)
