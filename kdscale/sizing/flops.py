"""Floating-point operations of a forward pass and of a training step, and the share of a GPU's peak that they are.

Model FLOPs are what the mathematics needs, whatever is recomputed or done twice: a multiply-add is 2, a backward pass
is twice its forward (PaLM, arXiv 2204.02311, appendix B). `kdscale plan-cluster` and the training log both count here.
"""

from __future__ import annotations

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
        """From the sizes in a config.json. Raises CheckpointError for a config its family refuses."""
        return cls.of_shape(ModelShape.of(config, load_family(dict(config), "config.json")), seq_len)

    @classmethod
    def of_shape(cls, shape: ModelShape, seq_len: int) -> ModelFlops:
        """Two per weight of each product, and 4·S·A per layer for the products QKᵀ and AV.

        Attention counts every position of the sequence, as PaLM does and as kernels compute under the mask of packed
        text, though the causal mask and the borders between documents need less than half of them.
        """
        attention = 4.0 * shape.layers * shape.attention * seq_len
        return cls(2.0 * (shape.products - shape.head) + attention, 2.0 * shape.head)

    @property
    def forward(self) -> float:
        """Of one token that has a label."""
        return self.per_token + self.per_label


def step_flops(teacher: ModelFlops | None, student: ModelFlops, tokens: float, labels: float) -> float:
    """One step's model FLOPs over all ranks: the teacher forward, the student forward and backward, heads included.

    `teacher` is None where other machines run it.
    """
    forwards = [(3, student), *([(1, teacher)] if teacher else [])]
    return sum(times * (tokens * model.per_token + labels * model.per_label) for times, model in forwards)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: `flops` of a step beside what GPUs of `peak` FLOP/s, added up, could do in `seconds`."""
    return flops / seconds / peak
