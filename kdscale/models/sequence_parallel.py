"""Sequence parallelism after DeepSpeed-Ulysses (arXiv 2309.14509), for any model that takes its attention from
transformers' registry. Each of R ranks has S/R positions of every sequence, and within attention all positions of 1/R
of the heads; ranks exchange data once before each attention and once after it.

DeepSpeed's own version for transformers (`UlyssesSPAttentionHF`) sees the borders of packed documents only with
FlashAttention, needs fixed shapes, and makes DeepSpeed divide gradients by stage; the exchange itself is a dozen lines.
To DeepSpeed the ranks here are ordinary data-parallel ones with fewer labels each.

Legend: B sequences, S positions, P = S/R positions of one rank, A heads, D head size, H hidden size, N rows with a
label.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kdscale.errors import ConfigError
from kdscale.models.attention import attend_within_documents
from kdscale.models.documents import Documents, recurrent_mixers
from kdscale.models.head import final_hidden
from kdscale.models.layer_records import LayerRecords


@dataclass(frozen=True)
class SequenceSlice:
    """What this rank has of every sequence: the `rank`-th of `ranks` equal runs of positions."""

    rank: int = 0
    ranks: int = 1
    group: Any = None

    def prepare(self, model: Any) -> None:
        """Give the model attention within documents; ranks that share sequences exchange heads for positions in it.

        Raises ConfigError when ranks share sequences and the model has an attention of its own or recurrent mixers.
        """
        shareable = attend_within_documents(model)
        if self.ranks > 1 and (not shareable or recurrent_mixers(model)):
            raise ConfigError(
                "distill.sequence_parallel",
                expected="a model that takes its attention from transformers' registry and has no recurrent mixers",
                got=type(model).__name__, hint="sequence_parallel: 1",
            )  # fmt: skip

    def hidden(
        self,
        model: Any,
        input_ids_BS: torch.Tensor,
        position_ids_BS: torch.Tensor,
        rows_N: torch.Tensor,
        documents: Documents | None = None,
        records: LayerRecords | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states [B, P, H] of this rank's positions, and `rows_N` as flat positions among them.

        The arguments are whole sequences and flat positions in them, of which `rows_N` must be this rank's. `records`
        take what they want of this forward. A collective call.
        """
        own_N, more = rows_N, dict[str, Any]()
        if self.ranks > 1:
            length = input_ids_BS.shape[1]
            own = length // self.ranks
            cut = slice(self.rank * own, (self.rank + 1) * own)
            documents = documents or Documents.of(position_ids_BS).to(input_ids_BS.device)
            input_ids_BS, position_ids_BS = input_ids_BS[:, cut], position_ids_BS[:, cut]
            own_N = rows_N // length * own + rows_N % length - self.rank * own
            more = {"ulysses": Exchange(self.group, self.ranks)}
        with records.of_forward(own_N) if records is not None else nullcontext(dict[str, Any]()) as recording:
            return final_hidden(model, input_ids_BS, position_ids_BS, documents, **more, **recording), own_N


class Exchange:
    """The exchanges between `ranks` ranks; a model hands it to its attention function among the keyword arguments."""

    def __init__(self, group: Any, ranks: int):
        self.ranks, self._group = ranks, group

    def heads(self, x_BAPD: torch.Tensor) -> torch.Tensor:
        """All positions of this rank's heads: [B, A/R, S, D] from [B, A, P, D]; fewer heads than ranks are repeated."""
        if (repeats := self.ranks // x_BAPD.shape[1]) > 1:  # several ranks need the same kv head
            x_BAPD = x_BAPD.repeat_interleave(repeats, 1)
        batch, heads, own, size = x_BAPD.shape
        chunks = x_BAPD.view(batch, self.ranks, heads // self.ranks, own, size).movedim(1, 0)
        exchanged = _AllToAll.apply(chunks, self._group)
        return exchanged.permute(1, 2, 0, 3, 4).reshape(batch, heads // self.ranks, self.ranks * own, size)

    def positions(self, x_BASD: torch.Tensor) -> torch.Tensor:
        """All heads of this rank's positions again: [B, P, A, D] from [B, A/R, S, D]."""
        batch, heads, length, size = x_BASD.shape
        own = length // self.ranks
        chunks = x_BASD.view(batch, heads, self.ranks, own, size).movedim(2, 0)
        exchanged = _AllToAll.apply(chunks, self._group)
        return exchanged.permute(1, 3, 0, 2, 4).reshape(batch, own, self.ranks * heads, size)


class _AllToAll(torch.autograd.Function):
    """Send x[r] to rank r of the group and receive its x[own rank]: its own inverse, and so its own gradient."""

    @staticmethod
    def forward(ctx: Any, x_R: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x_R, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(gradients[0], ctx.group), None


def _all_to_all(x_R: torch.Tensor, group: Any) -> torch.Tensor:
    x_R = x_R.contiguous()
    if len(x_R) == 1:
        return x_R
    out_R = torch.empty_like(x_R)
    dist.all_to_all_single(out_R, x_R, group=group)
    return out_R
