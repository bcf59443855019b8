"""Every loss inside a small network: accumulation, checkpointing, autocast and a frozen head, alone and all at once.

fused/test_autograd.py asks the same of linear_sparse_kl's default alone, to the bit; here the gradients go on into a
body, and the losses are those with options of their own.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdscale_kernels as kk

LOSSES = {
    "mixed": {"ce_weight": 0.3, "temperature": 2.0},
    "skewed": {"divergence": kk.Divergence("skewed_forward_kl", 0.2)},
    "sampled": {"tail": "sampled", "ce_weight": 0.2},
    "on logits": {"divergence": "skewed_reverse_kl"},
}


class Student(nn.Module):
    def __init__(self, *, frozen: bool, through_logits: bool):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24))
        self.head = nn.Linear(24, 203)
        self.head.requires_grad_(not frozen)
        self.through_logits = through_logits

    def forward(self, x, labels, *targets, **options):
        hidden = self.body(x)
        if self.through_logits:
            return kk.sparse_kl(self.head(hidden), *targets, labels_N=labels, **options).loss_sum
        head = (self.head.weight, *targets)
        return kk.linear_sparse_kl(hidden, *head, labels_N=labels, bias_V=self.head.bias, **options).loss_sum


def gradients(p, name, *, parts=1, checkpointed=False, autocast=False, frozen=False):
    """{parameter: gradient of the mean loss over all valid tokens}, the 11 rows taken in `parts` micro-batches."""
    student = Student(frozen=frozen, through_logits=name == "on logits")
    x = torch.randn(11, 10, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(11, 7, generator=torch.Generator().manual_seed(2))
    rows_each = torch.arange(11).tensor_split(parts)
    for rows in rows_each:
        options = dict(LOSSES[name])
        if options.get("tail") == "sampled":
            options["target_weights_NK"] = weights[rows]
        arguments = (x[rows], p.labels[rows], *(t[rows] for t in p.targets))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if checkpointed:
                loss = checkpoint(student, *arguments, use_reentrant=False, **options)
            else:
                loss = student(*arguments, **options)
        assert loss.dtype == torch.float32
        (loss / 10.0).backward()  # 10 valid rows in the whole batch
    return {key: value.grad for key, value in student.named_parameters() if value.grad is not None}


@pytest.fixture(scope="module")
def example(make_example):
    return make_example(temperature=1.0).cast(torch.float32, grad=False)


def check(got, want, tol):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == torch.float32
        assert float((got[key] - value).norm() / value.norm()) < tol, key


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("how", [{"parts": 4}, {"checkpointed": True}, {"parts": 3, "checkpointed": True}])
def test_the_way_of_computing_changes_nothing(example, name, how):
    check(gradients(example, name, **how), gradients(example, name), 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_frozen_head_leaves_the_rest_as_it_is(example, name):
    whole = gradients(example, name)
    check(gradients(example, name, frozen=True), {k: v for k, v in whole.items() if k.startswith("body")}, 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_is_near_and_keeps_master_gradients(example, name):
    check(gradients(example, name, autocast=True), gradients(example, name), 3e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_all_at_once(example, name):
    everything = {"autocast": True, "parts": 3, "checkpointed": True, "frozen": True}
    check(gradients(example, name, **everything), gradients(example, name, autocast=True, frozen=True), 2e-2)


def test_teacher_side_under_autocast(example):
    """fp32 hidden states and head: what bf16 ones give, in fp32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kk.linear_topk_lse(example.hidden, example.weight, 7)
    want = kk.linear_topk_lse(example.hidden.bfloat16(), example.weight.bfloat16(), 7)
    assert got.logits_NK.dtype == got.lse_N.dtype == torch.float32
    torch.testing.assert_close(got.logits_NK, want.logits_NK, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got.lse_N, want.lse_N, rtol=1e-2, atol=1e-2)
