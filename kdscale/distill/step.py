"""One optimiser step: teacher targets, student forward and backward over all micro-batches, normalised once.

B sequences, S positions, P positions of this rank, N valid positions, H hidden size, F figures of the objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kdscale.data.batches import Batch
from kdscale.data.packing import IGNORED_LABEL
from kdscale.distill.lookahead import Lookahead
from kdscale.distill.objectives.base import Objectives, StudentOutput
from kdscale.distill.telemetry.clock import Clock
from kdscale.models.documents import Documents
from kdscale.models.head import VocabShard, head_of
from kdscale.models.layer_records import LayerReader
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.runtime.device import put_on
from kdscale.runtime.ranks import all_reduce_sum, world_size
from kdscale.teacher.source import MicroBatch, TargetSource, most_answers
from kdscale.teacher.targets import Targets
from kdscale_launch.watchdog import enter


def to_device(batch: Batch, device: torch.device) -> MicroBatch:
    """A copy on `device`, but for the tags, which say which teacher to ask.

    Rows and documents are found on the CPU, before the copy: on a GPU that would wait for it.
    """
    labels_M = batch.labels_BS.reshape(-1)
    host_rows_N = (labels_M != IGNORED_LABEL).nonzero().squeeze(1)
    tags_N = batch.tags_BS.reshape(-1)[host_rows_N]
    tensors = [batch.input_ids_BS, batch.position_ids_BS, host_rows_N, labels_M[host_rows_N]]
    ids_BS, position_ids_BS, rows_N, labels_N = (tensor.to(device, non_blocking=True) for tensor in tensors)
    documents = Documents.of(batch.position_ids_BS).to(device)
    micro_batch = MicroBatch(ids_BS, position_ids_BS, rows_N, labels_N, batch.sequences, documents, tags_N, batch.step)
    if batch.own is None:
        return micro_batch
    length = batch.input_ids_BS.shape[1]
    sequence_N = host_rows_N // length
    answers_N = batch.own.answers_BS.reshape(-1)[host_rows_N] + sequence_N * most_answers(length)
    logprobs_N = batch.own.logprobs_BS.reshape(-1)[host_rows_N]
    return replace(
        micro_batch, is_own_N=batch.own.is_own_B[sequence_N], logprobs_N=logprobs_N.to(device, non_blocking=True),
        answers_N=answers_N.to(device, non_blocking=True),
    )  # fmt: skip


class StudentModule(nn.Module):
    """Hidden states and losses in one forward, called only through the engine, so that ZeRO-3 gathers the head too.

    `vocab_size`: rows of the head that the teacher knows too. `shard`: the part of the head that the model has, where
    tensor-parallel ranks share it. `sequence_slice`: the positions of each sequence that are this rank's.
    """

    def __init__(
        self,
        model: Any,
        objectives: Objectives,
        vocab_size: int,
        shard: VocabShard | None = None,
        sequence_slice: SequenceSlice | None = None,
    ):
        super().__init__()
        self.model, self.objectives = model, objectives
        self.objective_modules = objectives.modules
        self._layers = LayerReader(model, objectives.layers)
        self.vocab_size, self._shard, self._sequence_slice = vocab_size, shard, sequence_slice or SequenceSlice()
        self.at_hidden: Callable[[], None] = lambda: None  # called between the last hidden state and the losses

    def helpers(self) -> dict[str, nn.Parameter]:
        """The parameters of the objectives, by name: trained with the model's, and no part of it."""
        return {f"objectives.{name}": value for name, value in self.objective_modules.named_parameters()}

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the model that are trained, under its own names, and the helpers."""
        yield from ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        yield from self.helpers().items()

    def forward(self, batch: MicroBatch, targets: Targets) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """(summed loss of each objective, their figures [F]); see Objectives."""
        records = self._layers.records()
        hidden_BPH, own_N = self._sequence_slice.hidden(
            self.model, batch.input_ids_BS, batch.position_ids_BS, batch.rows_N, batch.documents, records
        )
        self.at_hidden()
        head = head_of(self.model)
        hidden_NH = hidden_BPH.reshape(-1, hidden_BPH.shape[-1]).index_select(0, own_N)
        student = StudentOutput(hidden_NH, head, self.vocab_size, self._shard)
        if records is not None:
            student = replace(student, layers_NH=records.layers_NH, attention=records.attention)
        if batch.rows == 0:
            zero = (hidden_BPH.sum() + head.weight_VH.sum()).float() * 0.0
            return self.objectives.of_nothing(zero + self.objectives.idle(student, targets, batch))
        return self.objectives(student, targets, batch)


def train_step(
    engine: Any,
    source: TargetSource,
    batches: Sequence[Batch],
    device: torch.device,
    clock: Clock,
    before_each: Callable[[], None] = lambda: None,
    stream: torch.cuda.Stream | None = None,
    update: bool = True,
) -> torch.Tensor:
    """Run one optimiser step through a DeepSpeed engine around a StudentModule.

    Returns [*counts, *figures, *loss of each micro-batch] of this rank, all sums (fp64, on the device). The
    loss is divided once by the tokens of the global batch. DeepSpeed averages gradients over ranks, which the factor
    `world` undoes; its division by the accumulation steps is switched off. `before_each` is called before each
    micro-batch; what it raises ends the step, of which weights and optimiser then have nothing. With `update=False` the
    accumulated gradients are left where they are and the optimiser does nothing; the engine then cannot be trained any
    further. On `stream`, if there is one, the teacher works ahead (lookahead.py).

    Of T tensor-parallel ranks each counts the tokens that all of them have, and DeepSpeed averages over world / T
    ranks: T cancels in the factor.
    """
    objectives: Objectives = engine.module.objectives
    counts = put_on(device, objectives.counts_of(batches))
    figures_begin, figures_end = len(objectives.counts), len(objectives.counts) + objectives.width
    totals = torch.zeros(figures_end + len(batches), dtype=torch.float64, device=device)
    totals[:figures_begin] = counts
    enter("collective")
    counted = all_reduce_sum(counts).clamp_min(1.0)
    scale, tokens_per = (world_size() / counted[0]).float(), objectives.tokens_per(counted)
    engine.module.at_hidden = lambda: clock.mark("student")
    ahead, following = Lookahead(source, stream), None
    for number, batch in enumerate(batches):
        before_each()
        enter("data")
        micro_batch = to_device(batch, device) if following is None else following
        clock.mark("data")
        enter("teacher")
        targets = ahead.targets(micro_batch)
        clock.mark("teacher")
        enter("student")
        losses, figures = engine(micro_batch, targets)
        loss_sum = objectives.weighted(losses, tokens_per, batch.step)
        totals[figures_begin:figures_end] += figures
        totals[figures_end + number] = loss_sum.detach()
        clock.mark("loss")
        # A loss or target that is not finite must reach the gradients even where the backward would hide it: the factor
        # is exactly 1 for finite values and NaN otherwise, and a NaN gradient makes the optimiser skip the step.
        finite = 1.0 + 0.0 * (loss_sum.detach() + targets.probe())
        if ahead.looks and number + 1 < len(batches):
            enter("teacher")
            following = to_device(batches[number + 1], device)
            ahead.begin(following)
        enter("backward")
        engine.backward(loss_sum * (scale * finite), scale_wrt_gas=False)
        clock.mark("backward")
        enter("optimiser")
        if update or number + 1 < len(batches):
            engine.step()
        clock.mark("optimiser")
    engine.module.at_hidden = lambda: None
    return totals
