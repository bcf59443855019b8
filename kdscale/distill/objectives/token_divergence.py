"""Token-level distillation from final hidden states: a thin layer over `kdscale_kernels`.

N rows (valid positions), H and G student's and teacher's hidden size, V vocabulary, K teacher's entries.

loss = α·CE + (1−α)·T²·D(teacher ‖ student), with D on the teacher's top K entries and one tail bucket, on tokens
sampled from the teacher, or on the whole vocabulary. No N×V tensor is made: the kernels walk the rows in chunks.
"""

from __future__ import annotations

import math
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
        if (entropy := self._settings.text_below_entropy) is not None and batch.step is not None:
            top_k = with_text(top_k, batch.labels_N, entropy)
        entries = (top_k.ids_NK, top_k.logits_NK, top_k.lse_N)
        return self._on_entries(student, entries, batch, tail=self._settings.tail)

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


def with_text(top_k: TopKTargets, labels_N: torch.Tensor, entropy: float) -> TopKTargets:
    """The same targets, but the text's token with probability 1 at rows where the teacher's entropy is below `entropy`.

    The entropy, in nats, is that of the K entries and one bucket for the rest. At temperature 1 the forward KL from
    such a target is the cross-entropy: α·CE + (1 − α)·CE, whatever α is.
    """
    logp_NK = top_k.logits_NK / top_k.temperature - top_k.lse_N[:, None]
    parts_NB = torch.cat([logp_NK.exp(), (1.0 - logp_NK.exp().sum(1, keepdim=True)).clamp_min(0.0)], 1)
    sure_N1 = torch.special.entr(parts_NB).sum(1, keepdim=True) < entropy
    ids_NK = top_k.ids_NK.clone()
    ids_NK[:, :1] = torch.where(sure_N1, labels_N[:, None], ids_NK[:, :1])
    certain_1K = torch.full_like(top_k.logits_NK[:1], -math.inf)
    certain_1K[:, 0] = 0.0
    logits_NK = torch.where(sure_N1, certain_1K, top_k.logits_NK)
    lse_N = top_k.lse_N.masked_fill(sure_N1[:, 0], 0.0)
    return TopKTargets(ids_NK, logits_NK, lse_N, top_k.temperature, top_k.vocab_size)


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
