"""JSD keeps its digits where beta leaves almost nothing of one side: fp32 steps against plain fp64 formulas."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import Divergence, reference
from kdscale_kernels.backend import kernels_are_interpreted
from kdscale_kernels.rows.divergences import log_mixture_ratios

INF = float("inf")
BETAS = [1e-12, 1e-7, 1e-3, 0.5, 0.9, 1.0 - 1e-3, 1.0 - 1e-7]


def jsd(teacher, student, beta):
    """(D, dD/dstudent) of rows of fp64 logits, by way of m / q - 1 = β·(p - q) / q."""
    p, q = teacher.softmax(1), student.softmax(1)
    over_p, over_q = torch.log1p((1.0 - beta) * (q - p) / p), torch.log1p(beta * (p - q) / q)
    u = -(1.0 - beta) * q * over_q
    return (u - beta * p * over_p).sum(), u - q * u.sum(1, keepdim=True)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("noise", [0.05, 1.0])
@pytest.mark.parametrize("op", ["sparse_kl", "linear_full_kl", "reference"])
def test_jsd_equals_fp64_for_every_beta(beta, noise, op):
    gen = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 50, generator=gen) * 2
    student = teacher + noise * torch.randn(6, 50, generator=gen)
    want, want_grad = jsd(teacher.double(), student.double(), beta)
    z, divergence, labels = student.requires_grad_(), Divergence("jsd", beta), torch.zeros(6, dtype=torch.int64)
    if op == "linear_full_kl":
        out = kk.linear_full_kl(z, torch.eye(50), teacher, torch.eye(50), labels_N=labels, divergence=divergence)
    else:
        module = kk if op == "sparse_kl" else reference
        values, ids = teacher.topk(50, 1)
        lse = teacher.double().logsumexp(1).float()
        out = module.sparse_kl(z, ids, values, lse, labels_N=labels, divergence=divergence)
    out.loss_sum.backward()
    assert float(out.kd_sum) == pytest.approx(float(want), rel=2e-5)
    assert float((z.grad - want_grad).norm() / want_grad.norm()) < 2e-5


def skewed(first, second, skew):
    """KL(first ‖ skew·first + (1 - skew)·second) of fp64 logits, for autograd."""
    f, g = first.softmax(1), second.softmax(1)
    return (f * -torch.log1p((1.0 - skew) * (g - f) / f)).sum()


@pytest.mark.parametrize("skew", [1e-7, 0.1, 0.9, 1.0 - 1e-3, 1.0 - 1e-5])
@pytest.mark.parametrize("noise", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("name", ["skewed_forward_kl", "skewed_reverse_kl"])
@pytest.mark.parametrize("op", ["sparse_kl", "sparse_kl in triton", "linear_full_kl"])
def test_skewed_divergences_equal_fp64_for_every_skew(skew, noise, name, op):
    """The loss falls with (1 - skew)², so what rounding leaves of terms of the order (1 - skew) may not stay in it."""
    gen = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 50, generator=gen) * 2
    student = teacher + noise * torch.randn(6, 50, generator=gen)
    wide = student.double().requires_grad_()
    sides = (teacher.double(), wide) if name == "skewed_forward_kl" else (wide, teacher.double())
    want = skewed(*sides, skew)
    want.backward()
    z, divergence, labels = student.requires_grad_(), Divergence(name, skew), torch.zeros(6, dtype=torch.int64)
    if op == "linear_full_kl":
        out = kk.linear_full_kl(z, torch.eye(50), teacher, torch.eye(50), labels_N=labels, divergence=divergence)
    else:
        values, ids = teacher.topk(50, 1)
        lse, backend = teacher.double().logsumexp(1).float(), "torch"
        if op.endswith("triton"):
            backend = "triton"
            if noise != 0.05 or not kernels_are_interpreted():
                pytest.skip("the interpreter takes its time")
        out = kk.sparse_kl(z, ids, values, lse, labels_N=labels, divergence=divergence, backend=backend)
    out.loss_sum.backward()
    assert float(out.kd_sum) == pytest.approx(float(want), rel=2e-5)
    assert float((z.grad - wide.grad).norm() / wide.grad.norm()) < 8e-5  # at most, where one student token is certain


@pytest.mark.parametrize("share", [1e-7, 0.3, 0.5, 0.8])
def test_mixture_ratios_at_the_ends(share):
    """Nothing of one side; almost nothing of it; nothing of either, which no weight lets count."""
    first, second = torch.tensor([-INF, -1.0, -200.0, -1.0, -INF]), torch.tensor([-1.0, -INF, -1.0, -200.0, -INF])
    over_first, over_second = log_mixture_ratios(first, second, share)
    logs = torch.tensor([share, 1.0 - share], dtype=torch.float64).log().float()
    torch.testing.assert_close(over_first[[1, 3]], logs[[0, 0]])
    torch.testing.assert_close(over_second[[0, 2]], logs[[1, 1]])
    assert over_first[4].isnan()
    assert over_second[4].isnan()
