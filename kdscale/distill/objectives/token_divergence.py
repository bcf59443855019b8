"""Token-level distillation from final hidden states: a thin layer over `kdscale_kernels`.

N rows (valid positions), H and G student's and teacher's hidden size, V vocabulary, K teacher's entries.

loss = α·CE + (1−α)·T²·D(teacher ‖ student), with D on the teacher's top K entries and one tail bucket, on tokens
sampled from the teacher, or on the whole vocabulary. No N×V tensor is made: the kernels walk the rows in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdscale.config.distill.objectives import TokenDivergenceConfig
from kdscale.config.distill.schedules import at
from kdscale.distill.objectives.base import StudentOutput
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import FullTargets, SampledTargets, Targets, TopKTargets
from kdscale_kernels import Divergence, linear_full_kl, linear_sparse_kl, vocab_parallel_sparse_kl


class TokenDivergence:
    """The objective `token_divergence`. Its sums are fp32, without a host sync."""

    def __init__(self, settings: TokenDivergenceConfig):
        self._settings = settings

    def _options(self, batch: MicroBatch) -> dict[str, Any]:
        settings = self._settings
        return {
            "labels_N": batch.labels_N,
            "ignore_index": None,  # all rows of a micro-batch have labels
            "ce_weight": at(settings.ce_weight, batch.step),
            "temperature": at(settings.temperature, batch.step),
            "divergence": Divergence(settings.divergence, settings.divergence_parameter),
        }

    def __call__(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, sums of kd, ce, teacher_mass, tail_mass, top1_agree)."""
        if self._settings.targets == "full":
            assert targets.full is not None
            return self._on_whole_vocabulary(student, targets.full, batch)
        if self._settings.targets == "sampled":
            assert targets.sampled is not None
            return self._on_sampled(student, targets.sampled, batch)
        assert targets.top_k is not None
        top_k = targets.top_k.first(self._settings.top_k)
        entries = (top_k.ids_NK, top_k.logits_NK, top_k.lse_N)
        options: dict[str, Any] = {"tail": self._settings.tail}
        if (limit := self._settings.text_below_entropy) is not None:
            own_N = torch.full_like(top_k.lse_N, at(self._settings.ce_weight, batch.step))
            options["ce_weight"] = own_N.masked_fill(entropy_of(top_k) < limit, 1.0)
        return self._on_entries(student, entries, batch, **options)

    def _on_sampled(
        self, student: StudentOutput, sampled: SampledTargets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's mass is that of the weights, 1 a row."""
        entries = (sampled.ids_NK, sampled.marks(), torch.zeros_like(sampled.weights_NK[:, 0]))
        return self._on_entries(student, entries, batch, tail="sampled", target_weights_NK=sampled.weights_NK)

    def _on_entries(
        self, student: StudentOutput, entries: Sequence[torch.Tensor], batch: MicroBatch, **target_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = sparse_loss(student, entries, {**self._options(batch), **target_options})
        return _sums(out, out.teacher_mass_sum, out.student_tail_sum)

    def _on_whole_vocabulary(
        self, student: StudentOutput, full: FullTargets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """There is no tail here, and no mass outside it.

        The teacher's head is multiplied here, and again each time that targets which were kept (validation) are used.
        """
        out: Any = linear_full_kl(
            student.hidden_NH,
            student.head.weight_VH,
            full.hidden_NG,
            full.head.weight_VH,
            bias_V=student.head.bias_V,
            teacher_bias_V=full.head.bias_V,
            softcap=student.head.softcap,
            teacher_softcap=full.head.softcap,
            vocab_size=student.vocab_size,
            **self._options(batch),
        )
        return _sums(out, out.tokens, torch.zeros_like(out.loss_sum))


def entropy_of(top_k: TopKTargets) -> torch.Tensor:
    """The teacher's entropy at each row [N], in nats, at its temperature: of its K entries and the rest as one."""
    p_NK = (top_k.logits_NK / top_k.temperature - top_k.lse_N[:, None]).exp()
    rest_N1 = (1.0 - p_NK.sum(1, keepdim=True)).clamp_min(0.0)
    return torch.special.entr(torch.cat([p_NK, rest_N1], 1)).sum(1)


def sparse_loss(student: StudentOutput, entries: Sequence[torch.Tensor], options: dict[str, Any]) -> Any:
    """The kernel's loss of the student on sparse targets, and its sums; `options` are those of `linear_sparse_kl`.

    `entries` are ids [N, K], logits [N, K] and log-sum-exp [N]. With a shard of the head this is a collective call; all
    its ranks get the same sums, and the whole gradient of the hidden states.
    """
    operands = (student.hidden_NH, student.head.weight_VH, *entries)
    options = {**options, "softcap": student.head.softcap, "vocab_size": student.vocab_size}
    if (shard := student.shard) is None:
        return linear_sparse_kl(*operands, bias_V=student.head.bias_V, **options)
    options |= {"bias_Vs": student.head.bias_V, "first_id": shard.first_id, "group": shard.group}
    return vocab_parallel_sparse_kl(*operands, **options)


def _sums(out: Any, teacher_mass: torch.Tensor, tail_mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sums = (out.kd_sum, out.ce_sum, teacher_mass, tail_mass, out.top1_agree_sum)
    return out.loss_sum, torch.stack([term.detach().float() for term in sums])
