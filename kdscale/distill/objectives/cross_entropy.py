"""Cross-entropy with the next token of the text, from final hidden states, without any teacher.

N rows (valid positions), H hidden size, V vocabulary.

The label is a distribution that has all its mass on one token, so this is `linear_sparse_kl` with the label as the only
entry: no N×V tensor is made, and tensor-parallel ranks share the head as they do with a teacher's entries.
"""

from __future__ import annotations

from typing import Any

import torch

from kdscale.config.distill.objectives import CrossEntropyConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.token_divergence import sparse_loss
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets


class CrossEntropy:
    """The objective `cross_entropy`, which has no settings. Its sums are fp32, without a host sync."""

    def __init__(self, _settings: CrossEntropyConfig):
        self._options: dict[str, Any] = {"ignore_index": None, "ce_weight": 1.0}  # all rows have labels

    def __call__(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, sums of ce and top1_accuracy)."""
        certain_N = torch.zeros(len(batch.labels_N), device=student.hidden_NH.device)  # log 1, of the label
        entries = (batch.labels_N[:, None], certain_N[:, None], certain_N)
        out = sparse_loss(student, entries, {**self._options, "labels_N": batch.labels_N})
        return out.loss_sum, torch.stack([term.detach().float() for term in (out.ce_sum, out.top1_agree_sum)])
