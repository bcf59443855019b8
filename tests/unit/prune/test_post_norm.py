"""A projection and the norm behind it, refitted together: against the function that made the targets."""

from __future__ import annotations

import pytest
import torch

from kdscale.errors import SelfCheckError
from kdscale.prune.compensation.post_norm import refit_through_norm

EPSILON = 1e-6


def _added(u, weight, gain):
    z = u @ weight.T
    return gain * z / (z.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def _setting(seed=0, tokens=600, outputs=12, inputs=20):
    random = torch.Generator().manual_seed(seed)
    u = torch.randn(tokens, inputs, generator=random)
    weight = torch.randn(outputs, inputs, generator=random)
    gain = torch.rand(outputs, generator=random) + 0.5
    return u, weight, gain, random


def _refit(u, target, weight, gain, weight_of_row=None, ridge=1e-6):
    weight_of_row = torch.ones(len(u), 1) if weight_of_row is None else weight_of_row
    halves = [*zip(*(rows.split(len(u) // 2) for rows in (u, target, weight_of_row)), strict=True)]
    return refit_through_norm(lambda: halves, weight, gain, EPSILON, ridge, "the test's layer")


def test_what_the_layer_adds_already_changes_nothing():
    u, weight, gain, _ = _setting()
    solved, new_gain = _refit(u, _added(u, weight, gain), weight, gain)
    assert torch.allclose(solved, weight, atol=1e-3)
    assert torch.allclose(new_gain, gain, atol=1e-3)


def test_another_gain_is_found_exactly():
    u, weight, gain, random = _setting()
    wanted = gain * (3 * torch.rand(len(gain), generator=random) - 1)  # some change their sign
    solved, new_gain = _refit(u, _added(u, weight, wanted), weight, gain)
    assert torch.allclose(new_gain, wanted, atol=2e-3)
    assert torch.allclose(_added(u, solved, new_gain), _added(u, weight, wanted), atol=2e-2)


def test_another_projection_is_found_as_nearly_as_by_descent():
    """An fp64 descent on the same squared error, from the same start, is better by less than a seventh."""
    u, weight, gain, random = _setting()
    wanted = weight + 0.7 * torch.randn(weight.shape, generator=random)
    target = 1.5 * _added(u, wanted, gain) + 0.3 * torch.randn(len(u), len(gain), generator=random)
    solved, new_gain = _refit(u, target, weight, gain)

    def error(w, g):
        return (_added(u.double(), w.double(), g.double()) - target.double()).square().mean()

    w, g = (tensor.double().clone().requires_grad_() for tensor in (weight, gain))
    optimizer = torch.optim.LBFGS([w, g], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = error(w, g)
        loss.backward()
        return loss

    optimizer.step(closure)
    ours, best, before = (
        float(error(*pair)) for pair in ((solved, new_gain), (w.detach(), g.detach()), (weight, gain))
    )
    assert best < 0.2 * before
    assert ours < 1.15 * best


def test_a_silent_layer_stays_as_it_is_and_nonsense_is_refused():
    u, weight, gain, _ = _setting()
    solved, new_gain = _refit(torch.zeros_like(u), torch.ones(len(u), len(gain)), weight, gain)
    assert torch.equal(new_gain, gain)
    assert torch.allclose(solved, weight)
    with pytest.raises(SelfCheckError, match="the test's layer"):
        _refit(u, torch.full((len(u), len(gain)), torch.nan), weight, gain)


def test_rows_that_do_not_count_have_no_say():
    u, weight, gain, random = _setting()
    wanted = 2 * gain
    target, counts = _added(u, weight, wanted), torch.ones(len(u), 1)
    target[::3], counts[::3] = 100 * torch.randn(target[::3].shape, generator=random), 0.0
    _, new_gain = _refit(u, target, weight, gain, counts)
    assert torch.allclose(new_gain, wanted, atol=5e-3)
