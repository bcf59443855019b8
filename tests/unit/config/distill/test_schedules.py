"""Schedules: values by step, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kdscale.config.distill.objectives import TokenDivergenceConfig
from kdscale.config.distill.schedules import Schedule, at


@pytest.mark.parametrize(
    ("shape", "over", "values"),
    [
        ("linear", 1.0, [4.0, 3.0, 2.0, 1.0, 1.0]),
        ("cosine", 1.0, [4.0, 3.25, 1.75, 1.0, 1.0]),
        ("step", 0.5, [4.0, 4.0, 1.0, 1.0, 1.0]),
        ("linear", 3.0, [4.0, 2.5, 1.0, 1.0, 1.0]),
        ("linear", 0.01, [4.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_a_schedule_goes_from_start_to_end_and_stays(shape, over, values):
    schedule = Schedule(start=4.0, end=1.0, shape=shape, over=over).in_steps(4)
    assert [schedule.at(step) for step in range(5)] == pytest.approx(values)
    assert at(schedule, None) == 1.0
    assert at(2.0, 3) == 2.0


@given(
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda ends: ends[0] != ends[1]),
    over=st.floats(1e-6, 1.0) | st.integers(2, 10**6).map(float),
    shape=st.sampled_from(["linear", "cosine", "step"]),
    steps=st.integers(1, 10**6),
    step=st.integers(0, 10**6),
)
def test_values_stay_between_the_ends_and_never_turn_back(ends, over, shape, steps, step):
    start, end = ends
    schedule = Schedule(start=start, end=end, over=over, shape=shape).in_steps(steps)
    low, high = sorted(ends)
    one, two = schedule.at(step), schedule.at(step + 1)
    assert low - 1e-12 <= one <= high + 1e-12
    assert (two - one) * (end - start) >= -1e-12
    assert schedule.at(0) == start


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight", {"start": 0.0, "end": -1.0}, r"weight\.end\n.*greater than or equal to 0"),
        ("weight", {"start": 1.0, "end": 1.0}, "must differ from start"),
        ("ce_weight", {"start": 0.0, "end": 1.5}, "at least 0 and at most 1"),
        ("temperature", {"start": 2.0, "end": 1.0, "over": 2.5}, "share of the steps, up to 1, or a whole number"),
        ("temperature", {"start": 2.0, "to": 1.0}, "temperature.to\n"),
        ("temperature", {"start": 2.0, "end": 1.0, "shape": "log"}, "'linear', 'cosine' or 'step'"),
        ("temperature", [2.0, 1.0], "a number, or a schedule"),
        ("temperature", True, "a number, or a schedule"),
        ("temperature", 10**400, "a finite number"),
        ("temperature", float("nan"), "a finite number"),
    ],
)
def test_what_is_no_schedule_is_refused(field, value, message):
    with pytest.raises(ValidationError, match=message):
        TokenDivergenceConfig(**{field: value})


def test_an_entry_is_settled_in_steps_and_says_what_follows_a_schedule():
    entry = TokenDivergenceConfig(temperature={"start": 3.0, "end": 1.0, "over": 0.5}, ce_weight=0.5)
    settled = entry.settled(None, 10)
    assert settled.scheduled(2) == {"token_divergence_temperature": 2.0}
    assert settled.needs.temperature_at(2) == 2.0
    assert "0.5·CE + 0.5·T²·forward_kl, T = 3 → 1 (linear, 50% of the steps), teacher's top 64" in entry.formula
