"""What a draft's acceptance is worth: tokens for each call of the teacher, and the speed-up that follows. numpy only.

A draft writes γ tokens one after another; the teacher reads them all at once and accepts a first part of them, and adds
one token of its own. At temperature 1 a token drawn from the draft's q is accepted with probability Σ min(p, q), where
p is the teacher's distribution; the greedy teacher accepts its own most likely token.

Source: Leviathan, Kalman and Matias 2023, arXiv 2211.17192, theorems 3.5 and 3.8, equation 1.

N scored tokens, in the order of the text.
"""

from __future__ import annotations

import numpy as np


def tokens_per_call(acceptance: float, length: int) -> float:
    """(1 − α^(γ+1)) / (1 − α): expected tokens for each call, if every token is accepted with the same probability α.

    `acceptance`: α, from 0 to 1; `length`: γ.
    """
    return float(sum(acceptance**accepted for accepted in range(length + 1)))


def tokens_per_call_along(acceptance_N: np.ndarray, piece_N: np.ndarray, length: int) -> float | None:
    """The same from the acceptance of each token of a text: the mean of Σ_i a_t · … · a_(t+i−1) over its positions t.

    Tokens that are easy to draft stand together, so this is more than the formula says of their mean. `acceptance_N`:
    from 0 to 1 (fp64); `piece_N`: the number of each token's document piece. None where no piece has `length` tokens.
    """
    starts = len(acceptance_N) - length + 1
    if starts < 1:
        return None
    whole = piece_N[:starts] == piece_N[length - 1 :]
    if not whole.any():
        return None
    accepted = np.ones(starts)
    total = np.ones(starts)
    for further in range(length):
        accepted = accepted * acceptance_N[further : further + starts]
        total += accepted
    return float(total[whole].mean())


def speed_up(tokens: float, length: int, draft_cost: float, check_cost: float) -> float:
    """How many times as fast the teacher writes with the draft as without it.

    `tokens`: tokens for each call; `draft_cost`: the time of one token of the draft's, `check_cost`: that of reading
    `length` + 1 tokens at once with the teacher, both in units of the time of one token of the teacher's. Equation 1 of
    the paper takes `check_cost` for 1, which is true while the teacher's weights are what takes the time to read.
    """
    return tokens / (length * draft_cost + check_cost)
