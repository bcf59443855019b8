"""A causal LM's output head, and the hidden states it reads: what losses and measurements work on instead of logits.

Some families scale their logits (Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`). Kernels know
no scale, so it is applied to what they read: `final_hidden` is scaled already, and the head's bias with it.

B sequences, S positions, C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kdscale.errors import CheckpointError
from kdscale.models.attention import to_attention
from kdscale.models.documents import Documents


@dataclass(frozen=True)
class OutputHead:
    """Scaled hidden states → logits, as the model itself does it: `softcap(h Wᵀ + b)`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        """Rows of the weight."""
        return self.weight_VH.shape[0]

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """fp32 logits [C, V]; the product itself runs in the weight's dtype, as in the model."""
        return self.capped(torch.nn.functional.linear(hidden_CH, self.weight_VH, self.bias_V).float())

    def capped(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Logits after the soft cap, where there is one."""
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)

    def first_rows(self, count: int) -> OutputHead:
        """The head of the first `count` tokens alone."""
        bias_V = None if self.bias_V is None else self.bias_V[:count]
        return OutputHead(self.weight_VH[:count], bias_V, self.softcap)

    def detached(self) -> OutputHead:
        """A head that does not keep the rest of its model in memory (a tied weight is the embedding itself)."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return OutputHead(self.weight_VH.detach(), bias_V, self.softcap)


@dataclass(frozen=True)
class VocabShard:
    """Marks a head that has the vocabulary's rows from `first_id` on; the ranks of `group` have the other rows."""

    first_id: int
    group: Any


def head_of(model: Any) -> OutputHead:
    """The head of a transformers causal LM; call it inside a module's forward, so that ZeRO-3 gathers the weight.

    Raises CheckpointError for a model without a head.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise CheckpointError(f"{type(model).__name__} has no output head", expected="a causal language model")
    bias_V, scale = getattr(linear, "bias", None), logit_scale(model)
    if bias_V is not None and scale != 1.0:
        bias_V = bias_V * scale
    return OutputHead(linear.weight, bias_V, getattr(model.config.get_text_config(), "final_logit_softcapping", None))


def logit_scale(model: Any) -> float:
    """What the model multiplies its logits by, before any soft cap."""
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return float(factor or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0) / float(divisor or 1.0)


def final_hidden(
    model: Any,
    input_ids_BS: torch.Tensor,
    position_ids_BS: torch.Tensor | None = None,
    documents: Documents | None = None,
    **more: Any,
) -> torch.Tensor:
    """The hidden states that enter the head, times the scale of its logits, [B, S, H].

    Packed documents do not see each other: a model with `attend_within_documents` is told where they are (`documents`,
    else found in the positions), and any other derives a mask from positions that restart, as there is neither an
    attention mask nor a cache. `more` goes on to every layer's attention function.
    """
    places_BS = position_ids_BS
    if places_BS is None:
        places_BS = torch.arange(input_ids_BS.shape[1]).expand_as(input_ids_BS)
    output = model.base_model(
        input_ids=input_ids_BS, position_ids=position_ids_BS, attention_mask=None, use_cache=False,
        **to_attention(model, places_BS, documents, input_ids_BS.device), **more,
    )  # fmt: skip
    hidden_BSH: torch.Tensor = output.last_hidden_state
    scale = logit_scale(model)
    return hidden_BSH if scale == 1.0 else hidden_BSH * scale
