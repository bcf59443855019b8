"""What the ops take and return.

Legend: N rows (tokens), H hidden size, V vocabulary, K teacher entries kept per row.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch

from kdscale_kernels.divergence import DIVERGENCES, FORWARD_KL, Divergence

IGNORE_INDEX = -100  # the label of a row that takes no part, as in torch's cross_entropy

Tail = Literal["bucket", "truncated", "renormalised", "sampled"]
Backend = Literal["auto", "torch", "triton"]
Mode = Literal["auto", "row_chunks", "vocab_slices"]


class TopKLse(NamedTuple):
    """The teacher's side: the K largest logits of each row and the log-sum-exp over the whole vocabulary."""

    ids_NK: torch.Tensor  # int64, descending by logit; among equal logits the lower id comes first
    logits_NK: torch.Tensor  # fp32, as the head gives them (after bias and soft-cap, before temperature)
    lse_N: torch.Tensor  # fp32, logsumexp(z / temperature)


@dataclass(frozen=True)
class SparseKL:
    """Sums over the valid rows; only `loss_sum` carries a gradient. None of them has waited for the device."""

    loss_sum: torch.Tensor  # fp32 scalar: sum of ce_weight * CE + (1 - ce_weight) * T^2 * D
    tokens: torch.Tensor  # int64 scalar: valid rows
    kd_sum: torch.Tensor  # sum of D at temperature T, without the T^2
    ce_sum: torch.Tensor  # sum of the cross-entropy at temperature 1 (nats), whatever ce_weight is
    teacher_mass_sum: torch.Tensor  # sum of the probability the teacher gives its K entries; of the weights, if sampled
    student_tail_sum: torch.Tensor  # sum of the probability the student gives everything else
    top1_agree_sum: torch.Tensor  # rows where the teacher's first id has the student's largest logit


@dataclass(frozen=True)
class FullKL:
    """Sums over the valid rows; only `loss_sum` carries a gradient. None of them has waited for the device."""

    loss_sum: torch.Tensor  # fp32 scalar: sum of ce_weight * CE + (1 - ce_weight) * T^2 * D
    tokens: torch.Tensor  # int64 scalar: valid rows
    kd_sum: torch.Tensor  # sum of D at temperature T over the whole vocabulary (nats), without the T^2
    ce_sum: torch.Tensor  # sum of the student's cross-entropy at temperature 1 (nats), whatever ce_weight is
    teacher_ce_sum: torch.Tensor  # the teacher's, likewise
    top1_agree_sum: torch.Tensor  # rows where both have the same first id (of equal logits the lower id)


@dataclass(frozen=True)
class LossOptions:
    """The loss as numbers, checked once when an op is called."""

    ce_weight: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = FORWARD_KL
    tail: Tail = "bucket"
    softcap: float | None = None

    def __post_init__(self) -> None:
        weighted = [name for name, info in DIVERGENCES.items() if info.takes_weights]
        good = isinstance(self.ce_weight, Real) and 0.0 <= self.ce_weight <= 1.0
        _require(good, "ce_weight", "a number from 0 to 1", self.ce_weight)
        require_positive("temperature", self.temperature)
        _require(self.tail in get_args(Tail), "tail", " | ".join(get_args(Tail)), self.tail)
        _require(
            self.tail != "sampled" or self.divergence.info.takes_weights,
            "divergence",
            f"{' | '.join(weighted)} with tail='sampled' (the others need the teacher's probabilities)",
            self.divergence.name,
        )
        if self.softcap is not None:
            require_positive("softcap", self.softcap)

    @property
    def exponentials(self) -> int:
        """Softmaxes that a gradient in the tail consists of: a second one for CE beside a divergence at T != 1."""
        return 1 + (self.temperature != 1.0 and self.ce_weight > 0.0)


def require_positive(name: str, value: Any) -> None:
    """Raise ValueError unless an argument is a positive, finite number."""
    _require(isinstance(value, Real) and 0.0 < float(value) < float("inf"), name, "a positive, finite number", value)


def integer(name: str, value: Any, least: int | None = None) -> int:
    """An integer argument as an int; ValueError for what is none (4.0 too) and for less than `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    good = number is not None and not isinstance(value, bool) and (least is None or number >= least)
    _require(good, name, "an integer" if least is None else f"an integer of at least {least}", value)
    return number  # type: ignore[return-value]


def _require(good: bool, field: str, expected: str, got: object) -> None:
    if not good:
        raise ValueError(f"{field}: expected {expected}, got {got!r}")
