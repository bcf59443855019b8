"""A causal LM's output head, and the hidden states it reads: what losses and measurements work on instead of logits.

B sequences, S positions, C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kdscale.errors import CheckpointError


@dataclass(frozen=True)
class Head:
    """Hidden states → logits, as the model itself does it: `softcap(scale · (h Wᵀ + b))`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        return self.weight_VH.shape[0]

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """fp32 logits [C, V]; the product itself runs in the weight's dtype, as in the model."""
        logits_CV = torch.nn.functional.linear(hidden_CH, self.weight_VH, self.bias_V).float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV

    __call__ = logits

    def unscaled(self, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden states, bias) that give the same logits without `scale`, for kernels that know no scale."""
        if self.scale == 1.0:
            return hidden_NH, self.bias_V
        return hidden_NH * self.scale, None if self.bias_V is None else self.bias_V * self.scale

    def detached(self) -> Head:
        """The head alone, so that the rest of its model can leave memory (a tied weight is the embedding itself)."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return Head(self.weight_VH.detach(), bias_V, self.scale, self.softcap)


def head_of(model: Any) -> Head:
    """The head of a transformers causal LM. Read inside a module's forward, so that ZeRO-3 gathers the weight."""
    linear = model.get_output_embeddings()
    if linear is None:
        raise CheckpointError(f"{type(model).__name__} has no output head", expected="a causal language model")
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    scale = float(factor or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0) / float(divisor or 1.0)
    return Head(linear.weight, getattr(linear, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def final_hidden(model: Any, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor | None = None) -> torch.Tensor:
    """The hidden states that enter the head, [B, S, H].

    Without an attention mask and without a cache transformers derives the block-diagonal causal mask from positions
    that restart at 0, so packed documents do not see each other.
    """
    output = model.base_model(
        input_ids=input_ids_BS, position_ids=position_ids_BS, attention_mask=None, use_cache=False
    )
    hidden_BSH: torch.Tensor = output.last_hidden_state
    return hidden_BSH


def check_unscaled_head(model: Any, where: str) -> None:
    """Raises CheckpointError for a model that scales its logits, which the distillation loss does not reproduce."""
    if (scale := head_of(model).scale) != 1.0:
        raise CheckpointError(
            f"{where}: the output head scales its logits", expected="1 (plain logits)", got=str(scale)
        )
