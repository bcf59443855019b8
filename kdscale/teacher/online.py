"""The teacher in the same process: a forward to the final hidden states, then its own head.

B sequences, S positions, P positions of this rank, N valid positions, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from kdscale.config.distill.objective import LayersRead
from kdscale.config.distill.settings import EIGHT_BITS
from kdscale.config.distill.targets import Needs
from kdscale.models.head import VocabShard
from kdscale.models.layer_records import LayerReader
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.teacher.head_targets import TargetsFromHead
from kdscale.teacher.placement.eight_bits import load_in_eight_bits
from kdscale.teacher.placement.placed import PlacedTeacher, Placement, ReplicatedTeacher, place_teacher
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import Targets


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
        self.model, self.gives, self._placed = placed.model, gives, placed
        self._from_head = TargetsFromHead(gives, vocab_size, seed, shard)
        self._sequence_slice = sequence_slice or SequenceSlice()
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
            targets = self._from_head(hidden_NH, head, batch)
        if not records:
            return targets
        return replace(targets, hidden_NG=records.layers_NH, attention=records.attention)


def open_online(request: SourceRequest) -> OpenedSource:
    """The teacher on this rank's device, its weights where distill.teacher_placement says. A collective call."""
    placement, shard = cast(Placement, request.cfg.distill.teacher_placement), None
    placed: PlacedTeacher
    if placement == "replicated" and request.load_split is not None:
        model, rows, shard = request.load_split(request.teacher_dir)
        placed = ReplicatedTeacher(model, rows)
    elif (dtype_name := request.cfg.distill.teacher_dtype) in EIGHT_BITS:
        model = load_in_eight_bits(
            request.teacher_dir, dtype_name, dtype=request.dtype, device=request.device,
            trust_remote_code=request.cfg.teacher.trust_remote_code,
        )  # fmt: skip
        placed = ReplicatedTeacher(model)
    else:
        placed = place_teacher(
            request.teacher_dir, placement, keep_head=request.needs.full, dtype=request.dtype, device=request.device,
            trust_remote_code=request.cfg.teacher.trust_remote_code,
        )  # fmt: skip
    return open_placed(placed, request, shard)


def open_placed(placed: PlacedTeacher, request: SourceRequest, shard: VocabShard | None = None) -> OpenedSource:
    """A teacher that is there as a source; `shard` is this rank's part of a head that ranks share."""
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
