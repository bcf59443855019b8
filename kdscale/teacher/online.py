"""The teacher in the same process: a forward to the final hidden states, then its own head.

B sequences, S positions, P positions of this rank, N valid positions, H hidden size, V vocabulary, K entries.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from kdscale.config.distill.objectives import LayersRead
from kdscale.config.distill.targets import Needs
from kdscale.models.head import OutputHead, VocabShard
from kdscale.models.layer_records import LayerReader
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.teacher.placement.placed import PlacedTeacher, Placement, ReplicatedTeacher, place_teacher
from kdscale.teacher.sampling import draw, uniforms_of
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import FullTargets, SampledTargets, Targets, TopKTargets
from kdscale_kernels import linear_topk_lse, vocab_parallel_topk_lse


class OnlineTeacher:
    """A placed causal LM, frozen and in eval mode, never part of any gradient; it gives what `gives` lists.

    For full targets the teacher must have been placed with `keep_head`: they are used after `targets` returns.
    `shard`: the part of the head that this rank has, where tensor-parallel ranks share the model; all of them get the
    same targets. `sequence_slice`: the positions of each sequence that are this rank's. `seed`: of the tokens that are
    sampled.
    """

    def __init__(
        self,
        placed: PlacedTeacher,
        gives: Needs,
        *,
        vocab_size: int,
        shard: VocabShard | None = None,
        sequence_slice: SequenceSlice | None = None,
        seed: int = 0,
    ):
        self.model, self.gives, self._seed = placed.model, gives, seed
        self._placed, self._vocab_size = placed, vocab_size
        self._shard, self._sequence_slice = shard, sequence_slice or SequenceSlice()
        self._layers = LayerReader(self.model, LayersRead(tuple(gives.hidden_layers), tuple(gives.attention_layers)))

    def prefetch(self, batch: MicroBatch) -> None:
        """Do nothing: the same device trains the student."""

    def close(self) -> None:
        """Do nothing: the model goes with this object."""

    @torch.no_grad()
    def targets(self, batch: MicroBatch) -> Targets:
        """The targets of the batch's rows; no other position reaches the head."""
        records = self._layers.records()
        hidden_BPH, own_N = self._sequence_slice.hidden(
            self.model, batch.input_ids_BS, batch.position_ids_BS, batch.rows_N, batch.documents, records
        )
        hidden_NH = hidden_BPH.reshape(-1, hidden_BPH.shape[-1]).index_select(0, own_N)
        with self._placed.head() as head:
            return Targets(
                rows=batch.rows,
                top_k=self._top_k(hidden_NH, head, batch.step) if self.gives.top_k else None,
                sampled=self._sampled(hidden_NH, head, batch) if self.gives.sampled else None,
                full=FullTargets(hidden_NH, head.detached()) if self.gives.full else None,
                hidden_NG=records.layers_NH if records else {},
                attention=records.attention if records else {},
            )

    def _top_k(self, hidden_NH: torch.Tensor, head: OutputHead, step: int | None) -> TopKTargets:
        temperature, count = self.gives.temperature_at(step), min(self.gives.top_k, self._vocab_size)
        options: dict[str, Any] = {
            "temperature": temperature, "softcap": head.softcap, "vocab_size": self._vocab_size
        }  # fmt: skip
        top: Any
        if (shard := self._shard) is None:
            top = linear_topk_lse(hidden_NH, head.weight_VH, count, bias_V=head.bias_V, **options)
        else:
            options |= {"first_id": shard.first_id, "group": shard.group, "bias_Vs": head.bias_V}
            top = vocab_parallel_topk_lse(hidden_NH, head.weight_VH, count, **options)
        return TopKTargets(top.ids_NK, top.logits_NK, top.lse_N, temperature, self._vocab_size)

    def _sampled(self, hidden_NH: torch.Tensor, head: OutputHead, batch: MicroBatch) -> SampledTargets:
        length = batch.input_ids_BS.shape[1]
        uniforms_ND = uniforms_of(batch.sequences, length, batch.rows_N, self.gives.sampled, self._seed)
        temperature = self.gives.temperature_at(batch.step)
        return draw(hidden_NH, head, uniforms_ND, temperature=temperature, vocab_size=self._vocab_size)


def open_online(request: SourceRequest) -> OpenedSource:
    """The teacher on this rank's device, its weights where distill.teacher_placement says. A collective call."""
    placement, shard = cast(Placement, request.cfg.distill.teacher_placement), None
    placed: PlacedTeacher
    if placement == "replicated" and request.load_split is not None:
        model, rows, shard = request.load_split(request.teacher_dir)
        placed = ReplicatedTeacher(model, rows)
    else:
        placed = place_teacher(
            request.teacher_dir, placement, keep_head=request.needs.full, dtype=request.dtype, device=request.device,
            trust_remote_code=request.cfg.teacher.trust_remote_code,
        )  # fmt: skip
    request.sequence_slice.prepare(placed.model)
    return OpenedSource(
        placed.vocab,
        lambda vocab_size: OnlineTeacher(
            placed,
            request.needs,
            vocab_size=vocab_size,
            shard=shard,
            sequence_slice=request.sequence_slice,
            seed=request.cfg.seed,
        ),
    )
