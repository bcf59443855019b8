"""The reverse KL to the teacher by its policy gradient, on tokens that the student drew itself.

For a token a that the student drew, log p_T(a) − log p_S(a) is an unbiased estimate of −KL(p_S ‖ p_T) at its place, and
the gradient of that estimate's expected value is E[(log p_T − log p_S)·∇log p_S] (REINFORCE; Lu and Thinking Machines
Lab, "On-Policy Distillation", 2025). Samples that were written some steps ago are corrected by the importance ratio
p_S / p_S-as-it-wrote, within 1 ± clip (PPO, arXiv 1707.06347, equation 7).

N rows (valid positions), C rows of a chunk, B sequences.
"""

from __future__ import annotations

import torch

from kdscale.config.distill.objectives import PolicyGradientConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.label_loss import label_loss
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets

_MOST_LOG_RATIO = 20.0  # beyond it the ratio stays what it is


class PolicyGradient:
    """The objective `policy_gradient`. Its sums are fp32, without a host sync."""

    def __init__(self, settings: PolicyGradientConfig):
        self._settings = settings

    def __call__(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, sums of reverse_kl, ratio and clipped)."""
        assert targets.label is not None and batch.logprobs_N is not None
        teacher_N, wrote_N, clip = targets.label.logprobs_N, batch.logprobs_N, self._settings.clip
        baseline_N = torch.zeros_like(wrote_N)
        if self._settings.baseline == "sequence":
            baseline_N = _means_of_sequences(teacher_N - wrote_N, batch)

        def loss_of(logprobs_C: torch.Tensor, rows: slice) -> torch.Tensor:
            if clip is None:
                return -(teacher_N[rows] - logprobs_C.detach() - baseline_N[rows]) * logprobs_C
            reward_C = teacher_N[rows] - wrote_N[rows] - baseline_N[rows]
            ratio_C = (logprobs_C - wrote_N[rows]).clamp(max=_MOST_LOG_RATIO).exp()
            return -torch.minimum(ratio_C * reward_C, ratio_C.clamp(1.0 - clip, 1.0 + clip) * reward_C)

        loss, logprobs_N = label_loss(student, batch.labels_N, loss_of)
        ratio_N = (logprobs_N - wrote_N).clamp(max=_MOST_LOG_RATIO).exp()
        clipped_N = torch.zeros_like(ratio_N) if clip is None else ((ratio_N - 1.0).abs() > clip).float()
        return loss, torch.stack([(logprobs_N - teacher_N).sum(), ratio_N.sum(), clipped_N.sum()])


def _means_of_sequences(values_N: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """For each row the mean of the values of its sequence's rows."""
    sequences, length = batch.input_ids_BS.shape
    of_N = batch.rows_N // length
    sums_B = values_N.new_zeros(sequences).index_add(0, of_N, values_N)
    counts_B = values_N.new_zeros(sequences).index_add(0, of_N, torch.ones_like(values_N))
    return (sums_B / counts_B.clamp_min(1.0))[of_N]
