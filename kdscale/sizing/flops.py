"""Floating-point operations of a forward pass and of a training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.families import load_family
from kdscale.sizing.model_shape import ModelShape


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of one model: `per_token` up to the final hidden state, `per_label` of the head."""

    per_token: float
    per_label: float

    @classmethod
    def of(cls, config: Mapping[str, Any], seq_len: int) -> ModelFlops:
        """From the shapes in config.json. Of a mixture, the experts that a token is routed to.

        Attention counts every position of the sequence, as PaLM does, though the causal mask and the borders between
        packed documents need less than half of them.
        """
        family = load_family(dict(config), "config.json")
        dims, count = family.dims(dict(config)), family.count_params(dict(config))
        matrices = sum(
            math.prod(spec.shape)
            for spec in family.tensors(dict(config)).values()
            if not spec.counts_as_embedding and len(spec.shape) > 1
        )
        attention = 4 * dims.layers * dims.heads * dims.head_dim * seq_len  # QKᵀ and AV
        return cls(2.0 * (matrices - (count.total - count.active)) + attention, 2.0 * dims.hidden * dims.vocab)


def step_flops(teacher: ModelFlops | None, student: ModelFlops, tokens: float, labels: float) -> float:
    """One step's model FLOPs over all ranks: the teacher forward, the student forward and backward, heads included.

    `teacher` is None where other machines run it.
    """
    forwards = [(3, student), *([(1, teacher)] if teacher else [])]
    return sum(times * (tokens * model.per_token + labels * model.per_label) for times, model in forwards)


def forward_flops(model: ModelShape, seq_len: int) -> float:
    """A token: 2 a parameter it is multiplied with (the head's too), and 4·S·A a layer for attention over the whole
    square, which is what kernels compute under the mask of packed text (PaLM, arXiv 2204.02311, appendix B)."""
    return 2.0 * model.products + 4.0 * seq_len * model.attention * model.layers
