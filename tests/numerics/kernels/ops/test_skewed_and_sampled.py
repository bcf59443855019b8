"""Skewed KL and sampled targets: what the tables in the neighbouring files do not already ask of every divergence."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference

INF = float("inf")
SKEWED = ["skewed_forward_kl", "skewed_reverse_kl"]


def drawn(p, draws=12, seed=0):
    """The example's targets replaced by draws from the teacher's entries: (ids, logits, lse), weights; with repeats."""
    gen = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, p.ids.shape[1], (p.ids.shape[0], draws), generator=gen)
    weights = torch.rand(pick.shape, generator=gen, dtype=torch.float64) + 0.1
    weights = (weights / weights.sum(1, keepdim=True)).to(p.logits.dtype)
    logits = p.logits.gather(1, pick)
    logits[:, 3] = -INF  # an empty slot: its weight must not count
    weights[:, 5] = 0.0  # an entry that counts for nothing
    return (p.ids.gather(1, pick), logits, p.lse), weights


def results(module, p, targets, bias, **options):
    out = module.linear_sparse_kl(
        p.hidden, p.weight, *targets, labels_N=p.labels, bias_V=p.bias if bias else None, **options
    )
    (out.loss_sum * 0.37).backward()
    return out, [t.grad for t in (p.hidden, p.weight, p.bias) if t.grad is not None]


@pytest.mark.parametrize("noise", [None, 0.05])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("head", [{}, {"temperature": 2.5}, {"temperature": 0.7, "softcap": 5.0, "vocab_size": 190}])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
def test_sampled_targets_equal_the_twin(make_example, noise, ce_weight, head, dtype, tol):
    bias = "softcap" in head
    example = make_example(
        noise=noise, with_bias=bias, dtype=dtype if dtype == torch.bfloat16 else torch.float32, **head
    )
    found = []
    for module, kind in ((kk, dtype), (reference, torch.float64)):
        p = example.cast(kind)
        targets, weights = drawn(p)
        options = head | {"ce_weight": ce_weight, "tail": "sampled", "target_weights_NK": weights}
        found.append(
            results(module, p, targets, bias, **options | ({"chunk_bytes": 4 * 203 * 8} if module is kk else {}))
        )
    (got, got_grads), (want, want_grads) = found
    for field in ("loss_sum", "kd_sum", "ce_sum", "teacher_mass_sum", "student_tail_sum", "top1_agree_sum"):
        torch.testing.assert_close(getattr(got, field).double(), getattr(want, field), rtol=tol, atol=tol)
    assert len(got_grads) == len(want_grads) == 2 + bias
    for actual, expected in zip(got_grads, want_grads, strict=True):
        assert float((actual.double() - expected).norm() / expected.norm()) < tol


def test_sampled_gradient_is_softmax_times_mass_minus_weights():
    logits = torch.randn(1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, weights = torch.tensor([[4, 1, 4, 4, 8]]), torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.5]], dtype=torch.float64)
    loss = kk.sparse_kl(
        logits,
        ids,
        torch.zeros(1, 5),
        torch.zeros(1),
        labels_N=torch.tensor([0]),
        tail="sampled",
        target_weights_NK=weights,
    )
    loss.loss_sum.backward()
    spread = torch.zeros(1, 9, dtype=torch.float64).scatter_add_(1, ids, weights)
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), 1) * 1.4 - spread, rtol=1e-12, atol=1e-15)


def test_the_mean_over_draws_is_the_gradient_of_the_full_kl(make_example):
    """One draw of id i has probability p_i and weight 1: the expectation over i is exact for every K = V draw."""
    p = make_example(rows=3, vocab=21, k=21).cast(torch.float64)
    (want,) = torch.autograd.grad(
        kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels).loss_sum, p.hidden
    )
    mean = torch.zeros_like(want)
    for slot in range(21):
        targets, one = (p.ids[:, slot : slot + 1], p.logits[:, slot : slot + 1], p.lse), torch.ones(3, 1).double()
        loss = kk.linear_sparse_kl(
            p.hidden, p.weight, *targets, labels_N=p.labels, tail="sampled", target_weights_NK=one
        ).loss_sum
        mean += torch.exp(p.logits[:, slot] - p.lse)[:, None] * torch.autograd.grad(loss, p.hidden)[0]
    torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-10)


def test_repeats_are_one_entry_with_the_sum_of_weights(make_example):
    p = make_example().cast(torch.float32)
    (ids, logits, lse), weights = drawn(p, draws=33)
    logits[:] = 0.0
    spread = torch.zeros(11, 203, dtype=torch.float64).scatter_add_(1, ids, weights.double())
    merged = spread.gather(1, p.ids).float()
    options = {"labels_N": p.labels, "tail": "sampled"}
    many = kk.linear_sparse_kl(p.hidden, p.weight, ids, logits, lse, target_weights_NK=weights, **options)
    once = kk.linear_sparse_kl(
        p.hidden, p.weight, p.ids, torch.zeros_like(p.logits), lse, target_weights_NK=merged, **options
    )
    torch.testing.assert_close(many.loss_sum, once.loss_sum)
    (a,), (b,) = (torch.autograd.grad(loss.loss_sum, p.hidden) for loss in (many, once))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", SKEWED)
@pytest.mark.parametrize("skew", [0.01, 0.5, 0.95])
@pytest.mark.parametrize("tail", ["bucket", "truncated", "renormalised"])
def test_skews_equal_the_twin(make_example, divergence, skew, tail):
    found = []
    for module in (kk, reference):
        p = make_example(noise=0.3).cast(torch.float64)
        found.append(results(module, p, p.targets, False, divergence=kk.Divergence(divergence, skew), tail=tail))
    torch.testing.assert_close(found[0][0].loss_sum, found[1][0].loss_sum, rtol=1e-9, atol=1e-11)
    for actual, expected in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("skewed", "plain"), [("skewed_forward_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")]
)
def test_a_small_skew_tends_to_the_plain_divergence(make_example, skewed, plain):
    p = make_example(noise=0.3).cast(torch.float64)
    options = {"labels_N": p.labels}
    near = kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, divergence=kk.Divergence(skewed, 1e-7), **options)
    exact = kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, divergence=plain, **options)
    torch.testing.assert_close(near.kd_sum, exact.kd_sum, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [kk, reference])
@pytest.mark.parametrize(
    "mode",
    [
        *(
            {"divergence": kk.Divergence(d, 0.2), "tail": t}
            for d in SKEWED
            for t in ("bucket", "truncated", "renormalised")
        ),
        {"tail": "sampled"},
    ],
)
def test_gradcheck(make_example, module, mode):
    p = make_example(rows=4, hidden=5, vocab=13, k=3).cast(torch.float64)
    if mode["tail"] == "sampled":
        mode = mode | {"target_weights_NK": torch.tensor([[0.5, 0.2, 0.4]], dtype=torch.float64).expand(4, 3)}

    def loss(hidden, weight):
        return module.linear_sparse_kl(
            hidden, weight, *p.targets, labels_N=p.labels, ce_weight=0.3, temperature=2.0, **mode
        ).loss_sum

    assert torch.autograd.gradcheck(loss, (p.hidden, p.weight))


@pytest.mark.parametrize("divergence", SKEWED)
@pytest.mark.parametrize("far", ["student", "teacher", "both", "neither"])
def test_vanishing_tails_stay_finite_and_equal_the_twin(divergence, far):
    """Masses of e^-200 on either side; the twin in fp64 sees them as ordinary numbers."""
    low = [-100.0, -100.5]
    student = [100.0, 99.0, *(low if far in ("student", "both") else [98.0, 97.0])]
    teacher = [100.0, 98.5, *(low if far in ("teacher", "both") else [98.0, 97.5])]
    values, ids = torch.tensor([teacher], dtype=torch.float64).topk(2, 1)
    lse, label = torch.tensor([teacher], dtype=torch.float64).logsumexp(1), torch.tensor([0])
    leaves = [torch.tensor([student], dtype=kind, requires_grad=True) for kind in (torch.float32, torch.float64)]
    got = kk.sparse_kl(leaves[0], ids, values.float(), lse.float(), labels_N=label, divergence=divergence)
    want = reference.sparse_kl(leaves[1], ids, values, lse, labels_N=label, divergence=divergence)
    for result in (got, want):
        result.loss_sum.backward()
    # fp32 holds a log-probability near 100 to 1e-5, and a teacher tail below 2^-24 not at all.
    torch.testing.assert_close(got.loss_sum.double(), want.loss_sum, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(leaves[0].grad.double(), leaves[1].grad, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("in_support", [True, False])
@pytest.mark.parametrize("mode", [*({"divergence": d} for d in SKEWED), {"tail": "sampled"}])
def test_nan_logit_poisons_its_row(make_example, mode, in_support):
    p = make_example().cast(torch.float32)
    if "tail" in mode:
        mode = mode | {"target_weights_NK": torch.full((11, 7), 0.1)}
    logits = (p.hidden @ p.weight.T).detach()
    column = int(p.ids[5, 2]) if in_support else int((set(range(203)) - set(p.ids[5].tolist())).pop())
    logits[5, column] = float("nan")
    logits.requires_grad_()
    loss = kk.sparse_kl(logits, *p.targets, labels_N=p.labels, **mode).loss_sum
    loss.backward()
    assert loss.isnan()
    assert logits.grad[5].isnan().any()
    assert logits.grad[[0, 1, 2, 4, 6]].isfinite().all()
