"""Vocabulary slices of bf16 logits on a CPU against the fp64 twin."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference
from kdscale_kernels.fused import bf16_slices

FIELDS = ("loss_sum", "kd_sum", "ce_sum", "teacher_mass_sum", "student_tail_sum", "top1_agree_sum")
LOSSES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5, "ce_weight": 0.4},
    {"divergence": "reverse_kl", "ce_weight": 0.2, "temperature": 2.0},
    {"divergence": kk.Divergence("jsd", 0.3)},
    {"divergence": "skewed_reverse_kl", "ce_weight": 0.5},
    {"tail": "truncated", "ce_weight": 1.0},
    {"tail": "renormalised"},
    {"vocab_size": 1000, "ce_weight": 0.3},
]
# Four slices of 256 or more: made again for the gradient, half of them kept, or all, in two blocks of rows or one.
BUDGETS = {"none kept": 1, "some kept": 96_000, "all kept": 1 << 20}


@pytest.fixture(autouse=True)
def never_without_bf16_slices(on_bf16_cpu, monkeypatch):
    calls = []
    read = bf16_slices.Bf16Slices.read
    monkeypatch.setattr(bf16_slices.Bf16Slices, "read", lambda *args: calls.append(1) or read(*args))
    yield
    assert calls


def run(module, p, **options):
    out = module.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, **options)
    (out.loss_sum * 0.37).backward()
    return out, [p.hidden.grad, p.weight.grad]


def by_slices(p, workspace_bytes=1 << 24, **options):
    return run(kk, p, mode="vocab_slices", chunk_bytes=40 * 256 * 2, workspace_bytes=workspace_bytes, **options)


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("noise", [None, 0.05])
@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_equals_the_twin(make_example, noise, options, budget):
    head = {name: options[name] for name in ("temperature", "vocab_size") if name in options}
    example = make_example(rows=40, vocab=1031, noise=noise, spread=0.5, dtype=torch.bfloat16, **head)
    want, want_grads = run(reference, example.cast(torch.float64), **options)
    got, grads = by_slices(example.cast(torch.bfloat16), budget, **options)
    for field in FIELDS:
        torch.testing.assert_close(getattr(got, field).double(), getattr(want, field), rtol=1e-3, atol=2e-3)
    for actual, expected in zip(grads, want_grads, strict=True):
        assert error(actual, expected) < (6e-3 if noise is None else 5e-3)


def test_rows_far_above_their_shift_are_made_again(make_example, monkeypatch):
    """Unrelated models with peaked logits: a shift from the entries is far off, and so are logits rounded by it."""
    example = make_example(rows=40, vocab=1031, spread=1.5, dtype=torch.bfloat16)
    _, want = run(reference, example.cast(torch.float64), ce_weight=0.3)
    errors = []
    for rise in (bf16_slices._RISE, float("inf")):
        monkeypatch.setattr(bf16_slices, "_RISE", rise)
        _, grads = by_slices(example.cast(torch.bfloat16), ce_weight=0.3)
        errors.append(max(error(*pair) for pair in zip(grads, want, strict=True)))
    assert errors[0] < 4.5e-3 < errors[1]


def test_a_label_that_holds_the_tail_is_exact(make_example):
    """Cross-entropy of a label outside the entries that the student is sure of: 1 - q cancels in its gradient."""
    example = make_example(rows=4, vocab=1031, dtype=torch.bfloat16)
    with torch.no_grad():
        for row in range(4):
            example.hidden[row] = (example.weight[example.labels[row]] * 0.6).bfloat16().double()
    _, want = run(reference, example.cast(torch.float64), ce_weight=1.0)
    _, grads = by_slices(example.cast(torch.bfloat16), ce_weight=1.0)
    for actual, expected in zip(grads, want, strict=True):
        assert error(actual, expected) < 1e-2


def test_same_bits_twice(make_example):
    example, runs = make_example(rows=40, vocab=1031, noise=0.1, dtype=torch.bfloat16), []
    for _ in range(2):
        out, grads = by_slices(example.cast(torch.bfloat16), 96_000, ce_weight=0.3, temperature=2.0)
        runs.append([out.loss_sum.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("workspace_bytes", [1, 1 << 20])
def test_a_nan_poisons_its_row_and_no_other(make_example, workspace_bytes):
    p = make_example(rows=40, vocab=1031, dtype=torch.bfloat16).cast(torch.bfloat16)
    with torch.no_grad():
        p.hidden[5, 0] = float("nan")
    out, (grad_hidden, _) = by_slices(p, workspace_bytes)
    assert out.loss_sum.isnan()
    assert grad_hidden[5].isnan().all()
    assert not grad_hidden[4].isnan().any()


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "ce_weight": 0.4}])
def test_entries_that_are_the_whole_vocabulary(make_example, options):
    """A slice of nothing but entries has no softmax."""
    head = {"temperature": options["temperature"]} if "temperature" in options else {}
    example = make_example(rows=40, vocab=33, k=33, noise=0.2, dtype=torch.bfloat16, **head)
    want, want_grads = run(reference, example.cast(torch.float64), **options)
    got, grads = by_slices(example.cast(torch.bfloat16), **options)
    torch.testing.assert_close(got.loss_sum.double(), want.loss_sum, rtol=1e-4, atol=1e-4)
    for actual, expected in zip(grads, want_grads, strict=True):
        assert error(actual, expected) < 5e-3
