"""linear_sparse_kl and sparse_kl against their fp64 twins: values, gradients, every mode."""

from __future__ import annotations

import itertools

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import DIVERGENCES, reference

MODES = list(itertools.product(DIVERGENCES, ["bucket", "truncated", "renormalised"], [0.0, 0.3, 1.0]))
HEADS = [
    {"temperature": 1.0},
    {"temperature": 2.5},
    {"temperature": 1.0, "softcap": 5.0, "with_bias": True},
    {"temperature": 0.7, "softcap": 5.0, "with_bias": True, "vocab_size": 190},
]


def close(got, want, tol):
    scale = want.double().abs().max().clamp(min=1e-30)
    return bool(((got.double() - want.double()).abs().max() / scale) <= tol)


def both(example, dtype, head, of_op=None, **mode):
    """(op's result, twin's) for the same stored numbers, each with gradients of hidden, weight and bias.

    `of_op`: options that the twin does not have.
    """
    out = []
    head = dict(head)
    bias_used = head.pop("with_bias", False)
    for module, kind in ((kk, dtype), (reference, torch.float64)):
        p = example.cast(kind)
        extra = {"chunk_bytes": 4 * 203 * 8, **(of_op or {})} if module is kk else {}
        result = module.linear_sparse_kl(
            p.hidden,
            p.weight,
            *p.targets,
            labels_N=p.labels,
            bias_V=p.bias if bias_used else None,
            **head,
            **mode,
            **extra,
        )
        (result.loss_sum * 0.37).backward()
        out.append((result, [t.grad for t in (p.hidden, p.weight, p.bias) if t.grad is not None]))
    return out


@pytest.mark.parametrize(("divergence", "tail", "ce_weight"), MODES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("noise", [None, 0.05])
def test_fp64_equals_twin(make_example, divergence, tail, ce_weight, head, noise):
    example = make_example(noise=noise, **head)
    (got, got_grads), (want, want_grads) = both(
        example, torch.float64, head, divergence=divergence, tail=tail, ce_weight=ce_weight
    )
    assert int(got.tokens) == int(want.tokens) == 10
    for field in ("loss_sum", "kd_sum", "ce_sum", "teacher_mass_sum", "student_tail_sum", "top1_agree_sum"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=1e-9, atol=1e-10)
    assert len(got_grads) == len(want_grads) == (3 if head.get("with_bias") else 2)
    for actual, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


OWN = torch.tensor([0.0, 0.3, 1.0, 0.75, 0.2, 1.0, 0.0, 0.6, 0.5, 1.0, 0.9], dtype=torch.float64)  # of 11 rows


@pytest.mark.parametrize("mode", ["row_chunks", "vocab_slices"])
@pytest.mark.parametrize(("divergence", "tail"), [*itertools.product(DIVERGENCES, ["bucket"]), ("jsd", "truncated")])
@pytest.mark.parametrize("head", HEADS)
def test_rows_may_have_ce_weights_of_their_own(make_example, divergence, tail, head, mode):
    example = make_example(**head)
    results = both(example, torch.float64, head, divergence=divergence, tail=tail, ce_weight=OWN, of_op={"mode": mode})
    (got, got_grads), (want, want_grads) = results
    for field in ("loss_sum", "kd_sum", "ce_sum", "teacher_mass_sum", "student_tail_sum", "top1_agree_sum"):
        torch.testing.assert_close(getattr(got, field), getattr(want, field), rtol=1e-9, atol=1e-10)
    for actual, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_bf16_rows_may_have_ce_weights_of_their_own(make_example):
    """Slices of bf16 logits on a CPU, within bf16's rounding."""
    example = make_example(rows=32, hidden=64, vocab=1000, k=16, temperature=2.0, dtype=torch.bfloat16, seed=3)
    mode = {"temperature": 2.0, "ce_weight": OWN.repeat(3)[:32], "of_op": {"mode": "vocab_slices"}}
    (got, got_grads), (want, want_grads) = both(example, torch.bfloat16, {}, **mode)
    assert close(got.loss_sum, want.loss_sum, 1e-2)
    for actual, expected in zip(got_grads, want_grads, strict=True):
        assert float((actual.double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(3), r"a floating tensor \[11\], got torch\.float32 \[3\]"),
        (torch.zeros(11, dtype=torch.int64), "a floating tensor"),
        (torch.full((11,), 1.5), "values from 0 to 1"),
        (torch.full((11,), torch.nan), "values from 0 to 1"),
    ],
)
def test_ce_weights_that_cannot_be_are_refused(make_example, weights, message):
    p = make_example().cast(torch.float64)
    with pytest.raises(ValueError, match=message):
        kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, ce_weight=weights)


@pytest.mark.parametrize(("divergence", "tail", "ce_weight"), MODES)
@pytest.mark.parametrize("noise", [None, 0.05])
def test_fp32_near_twin(make_example, divergence, tail, ce_weight, noise):
    head = {"temperature": 1.5}
    example = make_example(noise=noise, **head)
    (got, got_grads), (want, want_grads) = both(
        example, torch.float32, head, divergence=divergence, tail=tail, ce_weight=ce_weight
    )
    assert close(got.loss_sum, want.loss_sum, 1e-4)
    for actual, expected in zip(got_grads, want_grads, strict=True):
        assert actual.dtype == torch.float32
        assert close(actual, expected, 1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [None, 0.3, 0.05])
def test_bf16_matched_gradients_keep_their_digits(make_example, divergence, noise):
    """bf16 operands, fp32 logits: the gradient stays within rounding of bf16; bf16 logits would lose it entirely."""
    example = make_example(rows=32, hidden=64, vocab=1000, k=16, noise=noise, spread=0.35, dtype=torch.bfloat16, seed=3)
    (_, got), (_, want) = both(example, torch.bfloat16, {}, divergence=divergence)
    for actual, expected in zip(got, want, strict=True):
        assert actual.dtype == torch.bfloat16
        assert float((actual.double() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_kl_on_logits(make_example, inplace, temperature):
    example = make_example(temperature=temperature).cast(torch.float32)
    leaf = (example.hidden @ example.weight.T).detach().requires_grad_()
    options = {"labels_N": example.labels, "ce_weight": 0.4, "temperature": temperature, "vocab_size": 203}
    logits = leaf * 1.0
    (kk.sparse_kl(logits, *example.targets, inplace_grad=inplace, **options).loss_sum * 0.5).backward()
    wide = leaf.detach().double().requires_grad_()
    (reference.sparse_kl(wide, *example.targets, **options).loss_sum * 0.5).backward()
    assert close(leaf.grad, wide.grad, 1e-5)
    assert not leaf.grad[3].any()  # the ignored row
    assert torch.equal(logits, leaf) != inplace


def test_sparse_kl_inplace_refuses_a_second_backward(make_example):
    p = make_example().cast(torch.float32)
    logits = (p.hidden @ p.weight.T) * 1.0
    loss = kk.sparse_kl(logits, *p.targets, labels_N=p.labels, inplace_grad=True).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_gradcheck_of_the_twin(make_example):
    example = make_example(rows=4, hidden=5, vocab=13, k=3).cast(torch.float64)

    def loss(hidden, weight):
        return reference.linear_sparse_kl(
            hidden, weight, *example.targets, labels_N=example.labels, ce_weight=0.3, temperature=2.0, divergence="jsd"
        ).loss_sum

    assert torch.autograd.gradcheck(loss, (example.hidden, example.weight))
