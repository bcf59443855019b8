"""Sequence parallelism after DeepSpeed-Ulysses (arXiv 2309.14509), for any model that takes its attention from
transformers' registry. Each of R ranks has S/R positions of every sequence, and within attention all positions of 1/R
of the heads; ranks exchange data once before each attention and once after it.

DeepSpeed's own version for transformers (`UlyssesSPAttentionHF`) sees the borders of packed documents only with
FlashAttention, needs fixed shapes, and makes DeepSpeed divide gradients by stage; the exchange itself is a dozen lines.
To DeepSpeed the ranks here are ordinary data-parallel ones with fewer labels each.

Legend: B sequences, S positions, P = S/R positions of one rank, A query heads, G key-value heads, D head size, H hidden
size, N rows with a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from kdscale.errors import ConfigError
from kdscale.models.head import final_hidden

_NAME = "kdscale_ulysses"  # in transformers' registry of attention functions


@dataclass(frozen=True)
class SequenceSlice:
    """What this rank has of every sequence: the `rank`-th of `ranks` equal runs of positions."""

    rank: int = 0
    ranks: int = 1
    group: Any = None

    def prepare(self, model: Any) -> None:
        """Make the model's attention exchange heads for positions.

        Raises ConfigError for a model whose attention is not torch's.
        """
        if self.ranks == 1:
            return
        from transformers import AttentionInterface

        implementation = getattr(model.config.get_text_config(), "_attn_implementation", None)
        if implementation not in ("sdpa", _NAME):
            raise ConfigError(
                "distill.sequence_parallel", expected="a model whose attention is torch's (sdpa)",
                got=f"{type(model).__name__} with {implementation}", hint="sequence_parallel: 1",
            )  # fmt: skip
        AttentionInterface.register(_NAME, _attend)
        model.config._attn_implementation = _NAME
        model.config.get_text_config()._attn_implementation = _NAME

    def hidden(
        self, model: Any, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor, rows_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states [B, P, H] of this rank's positions, and `rows_N` as flat positions among them.

        The arguments are whole sequences and flat positions in them, of which `rows_N` must be this rank's. A
        collective call.
        """
        if self.ranks == 1:
            return final_hidden(model, input_ids_BS, position_ids_BS), rows_N
        length = input_ids_BS.shape[1]
        own = length // self.ranks
        cut = slice(self.rank * own, (self.rank + 1) * own)
        exchange = Exchange(self.group, self.ranks, position_ids_BS)
        hidden_BPH = final_hidden(model, input_ids_BS[:, cut], position_ids_BS[:, cut], ulysses=exchange)
        return hidden_BPH, rows_N // length * own + rows_N % length - self.rank * own


class Exchange:
    """One micro-batch's exchanges between `ranks` ranks, and its masks; `position_ids_BS` are those of whole sequences.

    The model hands it to its attention function among the keyword arguments.
    """

    def __init__(self, group: Any, ranks: int, position_ids_BS: torch.Tensor):
        self.ranks, self._group, self._positions_BS = ranks, group, position_ids_BS
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = {}

    def heads(self, x_BAPD: torch.Tensor) -> torch.Tensor:
        """All positions of this rank's heads: [B, A/R, S, D] from [B, A, P, D]."""
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

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, S, S] to add to the scores: 0 where a query sees a key, else -inf; None where causality is all.

        Documents are packed: where a position does not follow the one before it, another document begins. Made once for
        all layers of a window: of a boolean mask torch would make, and keep for the backward, one such array per layer.
        """
        key = (window, dtype)
        if key not in self._masks:
            seen_BSS = self._seen(window)
            self._masks[key] = (
                None
                if seen_BSS is None
                else torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device)
                .masked_fill_(~seen_BSS, float("-inf"))
                .unsqueeze(1)
            )
        return self._masks[key]

    def _seen(self, window: int | None) -> torch.Tensor | None:
        """[B, S, S], or None for one document per row and no window."""
        position_BS = self._positions_BS
        begins_BS = torch.zeros_like(position_BS, dtype=torch.bool)
        begins_BS[:, 1:] = position_BS[:, 1:] != position_BS[:, :-1] + 1
        length = position_BS.shape[1]
        window = length if window is None else min(window, length)
        if window == length and not bool(begins_BS.any()):
            return None
        document_BS = begins_BS.cumsum(1)
        index_S = torch.arange(length, device=position_BS.device)
        behind_SS = index_S[:, None] - index_S
        return (document_BS[:, :, None] == document_BS[:, None]) & (behind_SS >= 0) & (behind_SS < window)


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


def _attend(
    module: torch.nn.Module,
    query_BAPD: torch.Tensor,
    key_BGPD: torch.Tensor,
    value_BGPD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    ulysses: Exchange | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: [B, P, A, D] from this rank's positions of all heads."""
    if ulysses is None or attention_mask is not None or other.get("softcap") is not None:
        raise ConfigError(
            "distill.sequence_parallel", expected="attention without a mask or soft-cap of its own",
            got=type(module).__name__, hint="sequence_parallel: 1 for this family",
        )  # fmt: skip
    ranks, kv_heads = ulysses.ranks, key_BGPD.shape[1]
    if kv_heads < ranks:  # several ranks need the same kv head
        key_BGPD, value_BGPD = (x.repeat_interleave(ranks // kv_heads, 1) for x in (key_BGPD, value_BGPD))
    query, key, value = (ulysses.heads(x) for x in (query_BAPD, key_BGPD, value_BGPD))
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    mask = ulysses.mask(sliding_window, query.dtype)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )
    return ulysses.positions(out), None
