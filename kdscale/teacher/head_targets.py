"""What a teacher's head makes of its final hidden states: the top K, sampled tokens, the whole distribution.

N rows, H hidden size, V vocabulary, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kdscale.config.distill.targets import Needs
from kdscale.models.head import OutputHead, VocabShard
from kdscale.teacher.sampling import draw, uniforms_of
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import FullTargets, LabelTargets, SampledTargets, Targets, TopKTargets
from kdscale_kernels import linear_topk_lse, vocab_parallel_topk_lse


@dataclass(frozen=True)
class TargetsFromHead:
    """Makes the parts that `gives` lists, over the first `vocab_size` tokens; `seed` is that of the sampled ones.

    `shard`: the part of the head that this rank has, where tensor-parallel ranks share it; all get the same targets.
    """

    gives: Needs
    vocab_size: int
    seed: int
    shard: VocabShard | None = None

    def __call__(self, hidden_NH: torch.Tensor, head: OutputHead, batch: MicroBatch) -> Targets:
        """The targets of the batch's rows, whose hidden states `hidden_NH` are."""
        return Targets(
            rows=batch.rows,
            top_k=self._top_k(hidden_NH, head, batch.step) if self.gives.top_k else None,
            sampled=self._sampled(hidden_NH, head, batch) if self.gives.sampled else None,
            full=FullTargets(hidden_NH, head.detached()) if self.gives.full else None,
            label=self._label(hidden_NH, head, batch) if self.gives.label else None,
        )

    def _label(self, hidden_NH: torch.Tensor, head: OutputHead, batch: MicroBatch) -> LabelTargets:
        """The label's logit less the log-sum-exp; ranks that share the head never ask for it."""
        assert self.shard is None
        options: dict[str, Any] = {"softcap": head.softcap, "vocab_size": self.vocab_size}
        lse_N = linear_topk_lse(hidden_NH, head.weight_VH, 1, bias_V=head.bias_V, **options).lse_N
        logits_N = (hidden_NH.float() * head.weight_VH.index_select(0, batch.labels_N).float()).sum(1)
        if head.bias_V is not None:
            logits_N = logits_N + head.bias_V.index_select(0, batch.labels_N).float()
        return LabelTargets(head.capped(logits_N) - lse_N)

    def _top_k(self, hidden_NH: torch.Tensor, head: OutputHead, step: int | None) -> TopKTargets:
        temperature, count = self.gives.temperature_at(step), min(self.gives.top_k, self.vocab_size)
        options: dict[str, Any] = {
            "temperature": temperature, "softcap": head.softcap, "vocab_size": self.vocab_size
        }  # fmt: skip
        top: Any
        if (shard := self.shard) is None:
            top = linear_topk_lse(hidden_NH, head.weight_VH, count, bias_V=head.bias_V, **options)
        else:
            options |= {"first_id": shard.first_id, "group": shard.group, "bias_Vs": head.bias_V}
            top = vocab_parallel_topk_lse(hidden_NH, head.weight_VH, count, **options)
        return TopKTargets(top.ids_NK, top.logits_NK, top.lse_N, temperature, self.vocab_size)

    def _sampled(self, hidden_NH: torch.Tensor, head: OutputHead, batch: MicroBatch) -> SampledTargets:
        length = batch.input_ids_BS.shape[1]
        uniforms_ND = uniforms_of(batch.sequences, length, batch.rows_N, self.gives.sampled, self.seed)
        temperature = self.gives.temperature_at(batch.step)
        return draw(hidden_NH, head, uniforms_ND, temperature=temperature, vocab_size=self.vocab_size)
