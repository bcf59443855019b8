"""The teacher in the same process: forward to the final hidden state, then top-K and log-sum-exp through its own head.

With whole=True the hidden state itself is the target, and the head goes with it.

B sequences, S positions, N valid positions, H hidden size, V vocabulary, K entries.
"""

from __future__ import annotations

from typing import Any

import torch

from kdscale.models.head import VocabShard
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.teacher.placement.placed import PlacedTeacher
from kdscale.teacher.targets import FullTargets, TopKTargets
from kdscale_kernels import linear_topk_lse, vocab_parallel_topk_lse


class OnlineTeacher:
    """Wraps a placed causal LM; frozen, in eval mode, never part of any gradient.

    For `whole` targets the teacher must have been placed with `keep_head`: they go on after `targets` returns.
    `shard`: what part of the head this rank has, where tensor-parallel ranks share the model; they all get the same
    targets. `share`: what part of each sequence is this rank's.
    """

    def __init__(
        self,
        placed: PlacedTeacher,
        *,
        top_k: int,
        temperature: float,
        vocab_size: int,
        whole: bool = False,
        shard: VocabShard | None = None,
        share: SequenceSlice | None = None,
    ):
        self.model, self._shard, self._share = placed.model, shard, share or SequenceSlice()
        self._placed = placed
        self._top_k = min(top_k, vocab_size)
        self._temperature, self._vocab_size, self._whole = temperature, vocab_size, whole

    def expect(self, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor, rows_N: torch.Tensor) -> None:
        """Nothing to begin early: the same device trains the student."""

    def close(self) -> None:
        """Nothing to let go of."""

    @torch.no_grad()
    def targets(
        self, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor, rows_N: torch.Tensor
    ) -> TopKTargets | FullTargets:
        """Targets of the flat positions `rows_N` only: rows without a label never reach the head."""
        hidden_BPH, own_N = self._share.hidden(self.model, input_ids_BS, position_ids_BS, rows_N)
        hidden_NH = hidden_BPH.reshape(-1, hidden_BPH.shape[-1]).index_select(0, own_N)
        with self._placed.head() as head:
            if self._whole:
                return FullTargets(hidden_NH, head.detached())
            options: dict[str, Any] = {"temperature": self._temperature, "softcap": head.softcap}
            options |= {"vocab_size": self._vocab_size}
            top: Any
            if (shard := self._shard) is None:
                top = linear_topk_lse(hidden_NH, head.weight_VH, self._top_k, bias_V=head.bias_V, **options)
            else:
                options |= {"first_id": shard.first_id, "group": shard.group, "bias_Vs": head.bias_V}
                top = vocab_parallel_topk_lse(hidden_NH, head.weight_VH, self._top_k, **options)
        return TopKTargets(top.ids_NK, top.logits_NK, top.lse_N, self._temperature, self._vocab_size)
