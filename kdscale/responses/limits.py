"""How fast an endpoint is asked, and how much may be spent on it."""

from __future__ import annotations

import time
from collections.abc import Callable

from kdscale.config.responses.settings import LimitsConfig
from kdscale.responses.journal import Usage


class Pace:
    """Turns at even distances, so that neither requests nor tokens a minute are more than the limits."""

    def __init__(self, limits: LimitsConfig, clock: Callable[[], float] = time.monotonic):
        self._limits, self._clock = limits, clock
        self._next = clock()

    def turn(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may be sent; the turn is taken."""
        begins = max(self._next, self._clock())
        takes = [
            60.0 * amount / limit
            for amount, limit in ((1, self._limits.requests_per_minute), (tokens, self._limits.tokens_per_minute))
            if limit is not None
        ]
        self._next = begins + max(takes, default=0.0)
        return begins - self._clock()

    def hold(self, seconds: float) -> None:
        """Nobody's turn comes before so many seconds have passed."""
        self._next = max(self._next, self._clock() + seconds)


class Budget:
    """What was spent, and what the requests under way may still cost: together never more than the limits.

    A prompt's tokens are estimated until the endpoint has counted them.
    """

    def __init__(self, limits: LimitsConfig, spent: Usage):
        self._limits, self.spent = limits, spent
        self._reserved: list[Usage] = []

    def admit(self, most: Usage) -> bool:
        """Whether a request that takes at most so much may be sent; it is then under way."""
        after = self.spent + most
        for usage in self._reserved:
            after += usage
        tokens, cost = self._limits.total_tokens, self._limits.total_cost
        if (tokens is not None and after.total > tokens) or (cost is not None and self.cost(after) > cost):
            return False
        self._reserved.append(most)
        return True

    def settle(self, most: Usage, took: Usage) -> None:
        """The request that was admitted with `most` is over and took so much."""
        self._reserved.remove(most)
        self.spent += took

    @property
    def under_way(self) -> bool:
        """Whether a request has not been settled: it may take less than it might, which leaves room for others."""
        return bool(self._reserved)

    def cost(self, usage: Usage) -> float:
        """In the currency of the prices."""
        prices = self._limits
        return (usage.prompt_tokens * prices.input_price + usage.answer_tokens * prices.output_price) / 1e6

    def in_words(self) -> str:
        """`12,345 tokens, 0.12 spent`."""
        money = f", {self.cost(self.spent):.2f} spent" if self._limits.input_price or self._limits.output_price else ""
        return f"{self.spent.total:,} tokens{money}"
