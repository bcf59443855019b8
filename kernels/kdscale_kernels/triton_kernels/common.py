# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""What the Triton bodies share: soft-cap, log-sum-exps, masked loads, tiles.

Legend: V vocabulary, K teacher entries, T temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
MAX_INT = tl.constexpr(0x7FFFFFFF)
# Marks a masked place of a row with a soft-cap, where -inf is a logit like any other. The lowest bf16, also an fp32.
MASKED = tl.constexpr(-3.3895313892515355e38)


class Tile(NamedTuple):
    """For up to max_k entries per row: columns read at a time, and warps per program."""

    max_k: int
    block_v: int
    warps: int


def warps_for(warps: int) -> int:
    """The same number of threads on AMD, whose wavefronts hold 64 and not 32."""
    return warps // 2 if torch.version.hip else warps


@triton.jit
def cap(z, softcap):
    """(softcap·tanh(z / softcap), its slope). From exp, which every target has; absolute error about 1e-7·softcap."""
    tanh = 1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0)
    return tanh * softcap, 1.0 - tanh * tanh


@triton.jit
def is_nan(x):
    """Where x is NaN."""
    return x != x  # noqa: PLR0124 - only a NaN differs from itself


@triton.jit
def logaddexp(a, b):
    """log(exp(a) + exp(b)), also of -inf."""
    top = tl.maximum(a, b)
    top = tl.where(top == NEG_INF, 0.0, top)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def logsumexp(x_K):
    """log Σ exp(x), also of -inf alone."""
    top = tl.max(x_K, 0)
    top = tl.where(top == NEG_INF, 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x_K - top), 0))


@triton.jit
def load_tail(z_ptr, cols, vocab, softcap, SOFTCAP: tl.constexpr):
    """A block of a masked row, capped: (logits, -inf where masked or beyond the vocabulary; slope of the cap)."""
    if SOFTCAP:
        raw = tl.load(z_ptr + cols, mask=cols < vocab, other=MASKED).to(tl.float32)
        capped, slope = cap(raw, softcap)
        return tl.where(raw == MASKED, NEG_INF, capped), slope
    raw = tl.load(z_ptr + cols, mask=cols < vocab, other=NEG_INF).to(tl.float32)
    return raw, raw


@triton.jit
def add_block(z, top, plain_sum, tempered_sum, inv_t, TEMPERED: tl.constexpr):
    """Add one block to an online log-sum-exp: (maximum, Σexp(z - maximum), Σexp((z - maximum) / T) if TEMPERED)."""
    new_top = tl.maximum(top, tl.max(z, 0))
    shift = tl.where(new_top == NEG_INF, 0.0, new_top)
    plain_sum = plain_sum * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
    if TEMPERED:
        scaled = tempered_sum * tl.exp((top - shift) * inv_t)
        tempered_sum = scaled + tl.sum(tl.exp((z - shift) * inv_t), 0)
    return new_top, plain_sum, tempered_sum


@triton.jit
def load_logit(z_ptr, place, inside, softcap, SOFTCAP: tl.constexpr):
    """One logit, capped; NaN where the place is outside the vocabulary, so that a bad id poisons its row."""
    z = tl.load(z_ptr + place, mask=inside, other=float("nan")).to(tl.float32)
    if SOFTCAP:
        z, _slope = cap(z, softcap)
    return z
