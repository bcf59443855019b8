"""The teacher in the same process: forward to the final hidden state, then top-K and log-sum-exp through its own head.

B sequences, S positions, N valid positions, H hidden size, V vocabulary, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kdscale.errors import CheckpointError
from kdscale.teacher.targets import TopKTargets
from kdscale_kernels import linear_topk_lse


@dataclass(frozen=True)
class Head:
    """A language-model head: `weight_VH`, and what the family does to its logits."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    softcap: float | None


def head_of(model: Any) -> Head:
    """The head of a transformers causal LM. Read inside a module's forward, so that ZeRO-3 gathers the weight."""
    linear = model.get_output_embeddings()
    return Head(linear.weight, linear.bias, getattr(model.config, "final_logit_softcapping", None))


def check_plain_head(config: Any, where: str) -> None:
    """Raises CheckpointError for families that scale their logits in a way the loss does not reproduce."""
    for field in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if (value := getattr(config, field, None)) not in (None, 1, 1.0):
            raise CheckpointError(f"{where}/config.json: {field}", expected="1 (plain logits)", got=str(value))


def final_hidden(model: Any, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor) -> torch.Tensor:
    """The hidden states that enter the head, B×S×H.

    Without an attention mask and without a cache transformers derives the block-diagonal causal mask from positions
    that restart at 0, so packed documents do not see each other.
    """
    backbone = model.base_model
    return backbone(
        input_ids=input_ids_BS, position_ids=position_ids_BS, attention_mask=None, use_cache=False
    ).last_hidden_state


class OnlineTeacher:
    """Wraps a loaded causal LM; frozen, in eval mode, never part of any gradient."""

    def __init__(self, model: Any, *, top_k: int, temperature: float, vocab_size: int):
        self.model = model.eval().requires_grad_(False)
        self._top_k = min(top_k, vocab_size)
        self._temperature, self._vocab_size = temperature, vocab_size

    @torch.no_grad()
    def targets(self, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor, rows_N: torch.Tensor) -> TopKTargets:
        """Targets of the flat positions `rows_N` only: rows without a label never reach the head."""
        hidden_BSH = final_hidden(self.model, input_ids_BS, position_ids_BS)
        hidden_NH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1]).index_select(0, rows_N)
        head = head_of(self.model)
        top: Any = linear_topk_lse(
            hidden_NH,
            head.weight_VH,
            self._top_k,
            temperature=self._temperature,
            bias_V=head.bias_V,
            softcap=head.softcap,
            vocab_size=self._vocab_size,
        )
        return TopKTargets(top.ids_NK, top.logits_NK, top.lse_N, self._temperature, self._vocab_size)
