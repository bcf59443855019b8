"""Floating-point operations of a forward pass and of a training step, and the share of a GPU's peak that they are.

Model FLOPs are what the mathematics needs, whatever is recomputed or done twice: a multiply-add is 2, a backward pass
is twice its forward (PaLM, arXiv 2204.02311, appendix B). Attention needs the pairs of a query and a key that it sees:
within a document, causal, in its window. `kdscale plan-cluster` and the training log both count here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdscale.config.distill.recompute import Recompute
from kdscale.sizing.model_shape import ModelShape


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of one model: `per_token` of the products up to the final hidden state, `per_label` of the head.

    `per_pair`: of one query with one key, in all layers together whose attention reaches back so many positions.
    """

    per_token: float
    per_label: float
    per_pair: tuple[tuple[int | None, float], ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelFlops:
        """From the sizes in a config.json. Raises CheckpointError for a config its family refuses."""
        return cls.of_shape(ModelShape.of_config(config))

    @classmethod
    def of_shape(cls, shape: ModelShape) -> ModelFlops:
        """Two per weight of each product, and 4·A a pair and layer for QKᵀ and AV."""
        per_pair = tuple((window, 4.0 * shape.attention * layers) for window, layers in shape.windows)
        return cls(2.0 * (shape.products - shape.head), 2.0 * shape.head, per_pair)

    @classmethod
    def together(cls, models: Sequence[ModelFlops]) -> ModelFlops | None:
        """Of several models that all see the same tokens; None of none."""
        if not models:
            return None
        pairs = tuple(pair for model in models for pair in model.per_pair)
        return cls(sum(model.per_token for model in models), sum(model.per_label for model in models), pairs)

    def forward(self, tokens: float, labels: float, documents: Iterable[int]) -> float:
        """Of `tokens` in documents of these lengths, of which `labels` have a label."""
        lengths = Counter(documents)
        pairs = (each * attention_pairs(lengths, window) for window, each in self.per_pair)
        return tokens * self.per_token + labels * self.per_label + sum(pairs)

    def of_a_token(self, row: Iterable[int]) -> float:
        """The mean over the tokens of a row of such documents, each with a label."""
        lengths = list(row)
        return self.forward(sum(lengths), sum(lengths), lengths) / sum(lengths)


def attention_pairs(documents: Mapping[int, int], window: int | None) -> int:
    """Pairs of a query and a key before it or itself, at most `window` positions of each query; {length: how many}."""
    pairs = 0
    for length, count in documents.items():
        first = length if window is None else min(length, window)  # queries that see all keys before them
        pairs += count * (first * (first + 1) // 2 + (length - first) * first)
    return pairs


def step_flops(
    teacher: ModelFlops | None,
    student: ModelFlops,
    tokens: float,
    labels: float,
    documents: Iterable[int],
    losses: ModelFlops | None = None,
    adapters: int | None = None,
) -> float:
    """One step's model FLOPs over all ranks: the teacher forward, the student forward and backward, heads included.

    `teacher` is None where other machines run it; `documents` are the lengths of all of the step's documents; `losses`
    are what losses on layers add (sizing/layer_losses.py). `adapters`: the parameters that alone are trained.
    """
    lengths = list(documents)
    forwards = [(student_passes(adapters), student), (1, teacher), (1, losses)]
    flops = sum(times * model.forward(tokens, labels, lengths) for times, model in forwards if model is not None)
    return flops + adapter_flops(adapters) * tokens


def student_passes(adapters: int | None) -> int:
    """Forwards that a forward and a backward are worth: frozen weights get no gradient."""
    return 3 if adapters is None else 2


def adapter_flops(adapters: int | None) -> float:
    """Of the forward and backward of so many parameters of adapters, a token."""
    return 6.0 * (adapters or 0)


def recomputed_flops(shape: ModelShape, level: Recompute, row: Iterable[int]) -> float:
    """FLOPs a token that a level of recompute does again in the backward, of a row of such documents.

    A layer's last product is not among them unless its backward reads what that gives (`ModelShape.last_read`).
    """
    if not level.checkpoints:
        return 0.0
    flops, lengths = ModelFlops.of_shape(shape), list(row)
    last = 0.0 if shape.last_read else 2.0 * shape.hidden * shape.ffn * shape.layers
    products = 0.0 if level.products else flops.per_token - last
    attention = 0.0 if level.attention else flops.forward(0, 0, lengths) / sum(lengths)
    return products + attention


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: `flops` of a step beside what GPUs of `peak` FLOP/s, added up, could do in `seconds`."""
    return flops / seconds / peak
