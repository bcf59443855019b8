"""One optimiser step: teacher targets, student forward and backward over all micro-batches, normalised once.

B sequences, S positions, N valid positions, H hidden size, K teacher's top entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdscale.config.objectives import LossConfig
from kdscale.data.batches import Batch
from kdscale.data.packing import IGNORED_LABEL
from kdscale.distill.objectives.token_divergence import TERMS, distillation_loss, full_distillation_loss
from kdscale.distill.telemetry.clock import Clock
from kdscale.models.head import VocabShard, head_of
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.runtime.ranks import all_reduce_sum, world_size
from kdscale.teacher.source import Teacher
from kdscale.teacher.targets import FullTargets, TopKTargets
from kdscale_launch.watchdog import enter


@dataclass(frozen=True)
class Micro:
    """One micro-batch of whole sequences on the device; `rows_N` are the flat positions that have a label here."""

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    rows_N: torch.Tensor
    labels_N: torch.Tensor


def to_device(batch: Batch, device: torch.device) -> Micro:
    """Rows are picked on the CPU, before the copy: a boolean index on a GPU would wait for it."""
    labels_M = batch.labels_BS.reshape(-1)
    rows_N = (labels_M != IGNORED_LABEL).nonzero().squeeze(1)
    tensors = (batch.input_ids_BS, batch.position_ids_BS, rows_N, labels_M[rows_N])
    return Micro(*(tensor.to(device, non_blocking=True) for tensor in tensors))


class StudentModule(nn.Module):
    """Hidden states and loss in one forward, called only through the engine, so that ZeRO-3 gathers the head too.

    `shard`: what part of the head the model has, where tensor-parallel ranks share it; `share`: what part of each
    sequence is this rank's.
    """

    def __init__(
        self,
        model: Any,
        loss: LossConfig,
        vocab_size: int,
        shard: VocabShard | None = None,
        share: SequenceSlice | None = None,
    ):
        super().__init__()
        self.model, self._share = model, share or SequenceSlice()
        self._loss, self._vocab_size, self._shard = loss, vocab_size, shard
        self.at_hidden: Callable[[], None] = lambda: None  # called between the last hidden state and the loss

    def forward(self, micro: Micro, targets: TopKTargets | FullTargets) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, detached sums in the order of losses.TERMS)."""
        hidden_BPH, rows_N = self._share.hidden(self.model, micro.input_ids_BS, micro.position_ids_BS, micro.rows_N)
        self.at_hidden()
        head = head_of(self.model)
        if micro.rows_N.numel() == 0:  # every rank must still run a backward
            nothing = (hidden_BPH.sum() + head.weight_VH.sum()).float() * 0.0
            return nothing, nothing.detach().expand(len(TERMS))
        hidden_NH = hidden_BPH.reshape(-1, hidden_BPH.shape[-1]).index_select(0, rows_N)
        if isinstance(targets, FullTargets):
            teacher, vocab = targets.head, self._vocab_size
            return full_distillation_loss(
                hidden_NH, head, targets.hidden_NG, teacher, micro.labels_N, self._loss, vocab_size=vocab
            )
        return distillation_loss(
            hidden_NH,
            head.weight_VH,
            targets.ids_NK,
            targets.logits_NK,
            targets.lse_N,
            micro.labels_N,
            self._loss,
            bias_V=head.bias_V,
            softcap=head.softcap,
            vocab_size=self._vocab_size,
            shard=self._shard,
        )


def train_step(
    engine: Any,
    teacher: Teacher,
    batches: Sequence[Batch],
    device: torch.device,
    clock: Clock,
    update: bool = True,
) -> torch.Tensor:
    """Run one optimiser step through a DeepSpeed engine.

    Returns [tokens, *TERMS, *summed loss of each micro-batch] of this rank (fp64, on the device). The loss is divided
    once by the tokens of the global batch. DeepSpeed averages gradients over ranks, which the factor `world` undoes;
    its division by the accumulation steps is switched off. With `update=False` the accumulated gradients are left
    where they are and the optimiser does nothing; the engine then cannot be trained any further.

    Of T tensor-parallel ranks each counts the tokens that all of them have, and DeepSpeed averages over world / T
    ranks: T cancels in the factor.
    """
    tokens = torch.tensor(float(sum(batch.token_count for batch in batches)), dtype=torch.float64, device=device)
    totals = torch.zeros(1 + len(TERMS) + len(batches), dtype=torch.float64, device=device)
    totals[0] = tokens
    enter("collective")
    scale = world_size() / all_reduce_sum(tokens).clamp_min(1.0)
    engine.module.at_hidden = lambda: clock.mark("student")
    for number, batch in enumerate(batches):
        enter("data")
        micro = to_device(batch, device)
        clock.mark("data")
        enter("teacher")
        targets = teacher.targets(micro.input_ids_BS, micro.position_ids_BS, micro.rows_N)
        clock.mark("teacher")
        enter("student")
        loss_sum, terms = engine(micro, targets)
        totals[1 : 1 + len(TERMS)] += terms
        totals[1 + len(TERMS) + number] = loss_sum.detach()
        clock.mark("loss")
        # A loss or target that is not finite must reach the gradients even where the backward would hide it: the factor
        # is exactly 1 for finite values and NaN otherwise, and a NaN gradient makes the optimiser skip the step.
        finite = 1.0 + 0.0 * (loss_sum.detach() + targets.probe())
        enter("backward")
        engine.backward(loss_sum * (scale.float() * finite), scale_wrt_gas=False)
        clock.mark("backward")
        enter("optimiser")
        if update or number + 1 < len(batches):
            engine.step()
        clock.mark("optimiser")
    engine.module.at_hidden = lambda: None
    return totals
