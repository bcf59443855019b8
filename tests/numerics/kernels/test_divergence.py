"""The table of divergences: it loads no torch, and a row added from outside is trained with and allowed in a config."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
import torch

import kdscale_kernels as kk
from kdscale.config.distill.objectives import TokenDivergenceConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.token_divergence import TokenDivergence
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets, TopKTargets
from kdscale_kernels import reference
from kdscale_kernels.divergence import DIVERGENCES, Divergence, DivergenceInfo
from kdscale_kernels.rows.divergences import TORCH_DIVERGENCES, TorchDivergence
from kdscale_kernels.types import Mode


def test_the_table_and_the_config_load_no_torch():
    code = (
        "import sys, kdscale_kernels as kk, kdscale.config.distill.objectives;"
        "kk.Divergence('jsd'); assert 'torch' not in sys.modules, 'the table';"
        "kk.linear_sparse_kl; assert 'torch' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported():
    assert all(getattr(kk, name) is not None for name in kk.__all__)
    with pytest.raises(AttributeError, match="no attribute 'linear_kl'"):
        getattr(kk, "linear_kl")  # noqa: B009


def test_every_row_has_torch_maths():
    assert DIVERGENCES.keys() == TORCH_DIVERGENCES.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kl",), "divergence: expected forward_kl"),
        (("jsd", 1.0), r"divergence_parameter: expected beta of jsd, .* \(default 0.5\), got 1.0"),
        (("skewed_forward_kl", 0.0), "divergence_parameter: expected skew of skewed_forward_kl"),
        (("forward_kl", 0.5), "divergence_parameter: forward_kl takes none, got 0.5; leave it out"),
    ],
)
def test_a_divergence_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Divergence(*arguments)


def _alpha_terms(buckets, alpha):
    """(1 - Σ p^α·q^(1-α)) / (α·(1-α)), the α-divergence; a bucket gives its share of Σp in place of the 1."""
    mixed = buckets.p_CB**alpha * buckets.q_CB ** (1.0 - alpha)
    return (buckets.p_CB - mixed) / (alpha * (1.0 - alpha)), -mixed / alpha


def _alpha_definition(logp, logq, alpha):
    return (logp.exp() - (alpha * logp + (1.0 - alpha) * logq).exp()).sum() / (alpha * (1.0 - alpha))


@pytest.fixture
def alpha(monkeypatch):
    """The α-divergence as a new row, and its torch maths: all that a new divergence needs."""
    monkeypatch.setitem(DIVERGENCES, "alpha", DivergenceInfo("α-divergence", "Amari 1985", "alpha", default=0.3))
    monkeypatch.setitem(TORCH_DIVERGENCES, "alpha", TorchDivergence(_alpha_terms, _alpha_definition))


@pytest.mark.parametrize("tail", ["bucket", "truncated", "renormalised"])
@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.usefixtures("alpha")
def test_a_new_row_is_trained_with(make_example, tail, mode):
    options = {"divergence": Divergence("alpha", 0.6), "tail": tail, "ce_weight": 0.3, "temperature": 1.5}
    p, twin = (make_example(noise=0.3, temperature=1.5).cast(torch.float64) for _ in range(2))
    got = kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, mode=mode, **options)
    want = reference.linear_sparse_kl(twin.hidden, twin.weight, *twin.targets, labels_N=twin.labels, **options)
    torch.testing.assert_close(got.loss_sum, want.loss_sum, rtol=1e-9, atol=1e-11)
    for side in (got, want):
        side.loss_sum.backward()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(getattr(p, name).grad, getattr(twin, name).grad, rtol=1e-8, atol=1e-11)


@pytest.mark.usefixtures("alpha")
def test_a_new_row_is_trained_with_over_the_whole_vocabulary_and_by_its_name_in_a_config(make_example):
    p, twin = (make_example(noise=0.3).cast(torch.float64) for _ in range(2))
    teacher = torch.randn(11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = [
        module.linear_full_kl(s.hidden, s.weight, teacher, s.weight.detach(), labels_N=s.labels, divergence="alpha")
        for module, s in ((kk, p), (reference, twin))
    ]
    for loss in losses:
        loss.loss_sum.backward()
    torch.testing.assert_close(losses[0].loss_sum, losses[1].loss_sum, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(p.hidden.grad, twin.hidden.grad, rtol=1e-8, atol=1e-11)

    objective = TokenDivergence(TokenDivergenceConfig(divergence="alpha", divergence_parameter=0.6))
    student = StudentOutput(p.hidden, OutputHead(p.weight), len(p.weight))
    targets = Targets(rows=len(p.labels), top_k=TopKTargets(*p.targets, 1.0, len(p.weight)))
    labels_N = p.labels.clamp_min(0)  # a micro-batch has rows with a label alone
    total, _ = objective(student, targets, MicroBatch(labels_N, labels_N, labels_N, labels_N))
    want = reference.linear_sparse_kl(
        p.hidden, p.weight, *p.targets, labels_N=labels_N, divergence=Divergence("alpha", 0.6)
    )
    torch.testing.assert_close(total, want.loss_sum, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("alpha")
def test_a_row_without_triton_maths_says_so(make_example):
    pytest.importorskip("triton", reason="triton is not installed (the dev extra installs it on Linux)")
    p = make_example().cast(torch.float32)
    with pytest.raises(kk.BackendUnavailableError, match="the divergence alpha is written in torch only"):
        kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, divergence="alpha", backend="triton")
