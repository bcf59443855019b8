"""Perplexity against tokens, and how many times fewer tokens one curve needs than another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Curve = Sequence[tuple[int, float]]  # (tokens, perplexity), by tokens

# A logarithm has no place for the start: tokens are counted from here. About half of a step of the smallest budget.
FROM_TOKENS = 1_000


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_curve(curves: Sequence[Mapping[int, float]]) -> list[tuple[int, float]]:
    """The geometric mean of several seeds' curves, at each budget over the seeds that have it."""
    budgets = sorted({tokens for curve in curves for tokens in curve})
    return [(tokens, geometric_mean([curve[tokens] for curve in curves if tokens in curve])) for tokens in budgets]


def tokens_to_reach(curve: Curve, level: float) -> float | None:
    """After how many tokens the curve is first at `level` or below; None where it never is.

    Between two budgets the logarithm of perplexity is a straight line over that of the tokens (and FROM_TOKENS).
    """
    before: tuple[int, float] | None = None
    for tokens, perplexity in curve:
        if perplexity <= level:
            if before is None or before[1] <= perplexity:
                return float(tokens)
            share = math.log(before[1] / level) / math.log(before[1] / perplexity)
            first, last = (math.log(at + FROM_TOKENS) for at in (before[0], tokens))
            return math.exp(first + share * (last - first)) - FROM_TOKENS
        before = (tokens, perplexity)
    return None


def times_fewer(recipe: Curve, ours: Curve, tokens: int) -> str:
    """How many times fewer tokens `ours` needs for what the recipe has after `tokens`: `4.2`, or a bound.

    `at once`: ours is there before any training. `<0.3`: not within its budgets, of which the largest is 3.3 times as
    many. `–`: one of the two is not measured there.
    """
    level = dict(recipe).get(tokens)
    if level is None or not ours or not tokens:
        return "–"
    needed = tokens_to_reach(ours, level)
    if needed is None:
        return f"<{tokens / ours[-1][0]:.2g}" if ours[-1][0] else "–"
    return f"{tokens / needed:.1f}" if needed else "at once"


def recipe_needs(recipe: Curve, ours: Curve, tokens: int) -> str:
    """The tokens that the recipe needs for what `ours` has after `tokens`, in thousands: `61k`, or `>300k`."""
    level = dict(ours).get(tokens)
    if level is None or not recipe:
        return "–"
    needed = tokens_to_reach(recipe, level)
    return f">{in_thousands(recipe[-1][0])}" if needed is None else in_thousands(needed)


def in_thousands(tokens: float) -> str:
    """`0`, `30k`, `1M`."""
    if tokens >= 1e6:
        return f"{tokens / 1e6:.3g}M"
    return f"{tokens / 1e3:.3g}k" if tokens else "0"
