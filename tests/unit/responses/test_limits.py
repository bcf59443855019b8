"""Pace and budget: turns at even distances, and never more reserved than there is to spend."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdscale.config.responses.settings import LimitsConfig
from kdscale.responses.journal import Usage
from kdscale.responses.limits import Budget, Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.integers(1, 500), min_size=2, max_size=30), st.integers(1, 100), st.integers(1, 5000))
def test_no_minute_has_more_requests_or_tokens_than_the_limits(tokens: list[int], requests: int, limit: int) -> None:
    clock = Clock()
    pace = Pace(LimitsConfig(requests_per_minute=requests, tokens_per_minute=limit), clock)
    sent = []
    for amount in tokens:
        clock.now += pace.turn(amount)
        sent.append((clock.now, amount))
    for begin, _ in sent:
        within = [amount for at, amount in sent if begin <= at < begin + 60.0 - 1e-6]
        assert len(within) <= requests + 1  # one at each end
        assert sum(within[:-1]) <= limit + 1


def test_without_limits_nobody_waits_and_a_hold_holds_everybody() -> None:
    clock = Clock()
    pace = Pace(LimitsConfig(), clock)
    assert [pace.turn(10**6), pace.turn(1)] == [0.0, 0.0]
    pace.hold(7.0)
    clock.now = 2.0
    assert [pace.turn(1), pace.turn(1)] == [5.0, 5.0]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=40), st.integers(0, 300))
def test_the_budget_holds_whatever_the_answers_take(requests: list[tuple[int, int]], limit: int) -> None:
    budget = Budget(LimitsConfig(total_tokens=max(limit, 1)), Usage())
    under_way = []
    for most, took in requests:
        if budget.admit(Usage(most, 0)):
            under_way.append((Usage(most, 0), Usage(min(most, took), 0)))
        elif under_way:
            budget.settle(*under_way.pop(0))
    for pair in under_way:
        budget.settle(*pair)
    assert budget.spent.total <= max(limit, 1)
    assert not budget.under_way


def test_a_cost_counts_prompts_and_answers_at_their_prices() -> None:
    limits = LimitsConfig(total_cost=1.0, input_price=2.0, output_price=8.0)
    budget = Budget(limits, Usage(100_000, 50_000))
    assert budget.cost(budget.spent) == 0.6
    assert not budget.admit(Usage(0, 50_001))
    assert budget.admit(Usage(0, 50_000))
    assert budget.in_words() == "150,000 tokens, 0.60 spent"
