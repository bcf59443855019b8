from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdscale.distill.schedule import cosine_lr, seed_step, total_steps


@given(steps=st.integers(1, 400), warmup=st.integers(0, 500), lr=st.floats(1e-6, 1.0), share=st.floats(0.0, 1.0))
def test_shape_of_the_schedule(steps, warmup, lr, share):
    floor = lr * share
    rates = [cosine_lr(s, steps=steps, warmup_steps=warmup, lr=lr, min_lr=floor) for s in range(steps)]
    warm = min(warmup, steps // 2)
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in rates if floor > 0)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert rates[-1] == pytest.approx(floor, abs=1e-12 * lr)
    if warm:
        assert rates[warm - 1] == pytest.approx(lr)


def test_known_values():
    at = [cosine_lr(s, steps=12, warmup_steps=2, lr=1.0, min_lr=0.1) for s in range(12)]
    assert at[:2] == [0.5, 1.0]
    assert at[6] == pytest.approx(0.55)  # half way through the ten steps of the cosine
    assert at[3] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.2)))


def test_a_floor_above_the_peak_is_the_peak():
    assert cosine_lr(9, steps=10, warmup_steps=0, lr=1e-5, min_lr=1e-4) == pytest.approx(1e-5)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (4096, 1), (4097, 2), (1_000_000, 245)])
def test_total_steps_covers_the_tokens(tokens, steps):
    assert total_steps(tokens, 512, 8) == steps


def draw():
    return (torch.rand(3).tolist(), random.random(), float(np.random.rand()))


def test_a_step_draws_the_same_numbers_every_time():
    seed_step(1, 5, 0)
    first = draw()
    assert first != draw()
    of_other_steps = []
    for seed, step, rank in ((2, 5, 0), (1, 6, 0), (1, 5, 1)):
        seed_step(seed, step, rank)
        of_other_steps.append(draw())
    seed_step(1, 5, 0)
    assert first == draw()
    assert len({repr(numbers) for numbers in [first, *of_other_steps]}) == 4
