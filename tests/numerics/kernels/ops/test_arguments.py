"""What the ops are given: things of the wrong type, targets that no teacher gives, batches of sequences for rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kdscale_kernels as kk
from kdscale_kernels.ops import arguments
from kdscale_kernels.rows.teacher_entries import prepare_entries

INF = float("inf")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_VH": nn.Linear(24, 203)}, r"weight: expected a tensor, got Linear; pass its \.weight"),
        ({"hidden_NH": [[1.0]]}, "hidden_NH: expected a tensor, got list"),
        ({"labels_N": None}, "labels_N: expected a tensor, got None"),
        ({"bias_V": nn.LayerNorm(203)}, "bias_V: expected a tensor, got LayerNorm"),
        ({"target_weights_NK": 1.0}, "target_weights_NK: expected a tensor, got float"),
        ({"hidden_NH": torch.zeros(24)}, r"hidden: expected a floating \[N, H\]"),
        ({"temperature": "2"}, "temperature: expected a positive, finite number, got '2'"),
        ({"temperature": torch.tensor(2.0)}, "temperature: expected a positive, finite number"),
        ({"softcap": INF}, "softcap: expected a positive, finite number, got inf"),
        ({"ce_weight": None}, "ce_weight: expected a number from 0 to 1, got None"),
        ({"divergence": ["jsd"]}, "divergence: expected forward_kl"),
        ({"vocab_size": 203.0}, "vocab_size: expected an integer, got 203.0"),
        ({"ignore_index": 1.5}, "ignore_index: expected an integer, got 1.5"),
        ({"chunk_bytes": 1e6}, "chunk_bytes: expected an integer of at least 1, got 1000000.0"),
        ({"workspace_bytes": True}, "workspace_bytes: expected an integer of at least 1, got True"),
    ],
)
def test_what_is_of_the_wrong_type_is_named(make_example, change, match):
    p = make_example().cast(torch.float32)
    names = ("ids_NK", "teacher_logits_NK", "teacher_lse_N")
    given = {"hidden_NH": p.hidden, "weight_VH": p.weight, "labels_N": p.labels}
    with pytest.raises(ValueError, match=match):
        kk.linear_sparse_kl(**given | dict(zip(names, p.targets, strict=True)) | change)


@pytest.mark.parametrize("k", [4.0, "4", None, True, 0, torch.tensor(4.0)])
def test_k_is_an_integer(make_example, k):
    p = make_example().cast(torch.float32)
    with pytest.raises(ValueError, match="k: expected an integer of at least 1, got"):
        kk.linear_topk_lse(p.hidden, p.weight, k)


def test_a_parameter_of_a_divergence_is_a_number():
    with pytest.raises(ValueError, match=r"divergence_parameter: expected beta of jsd, .* got '0.3'"):
        kk.Divergence("jsd", "0.3")


def spoil(p, fault):
    """Targets that are wrong in row 4, which is valid row 3."""
    ids, logits, lse = (t.clone() for t in p.targets)
    if fault == "infinite":
        logits[4, 2] = INF
    elif fault == "two logits":
        ids[4, 2] = ids[4, 1]
    elif fault == "infinite log-sum-exp":
        lse[4] = INF
    else:
        lse[4] = logits[4, 0] - 1.0
    return ids, logits, lse


FAULTS = {
    "infinite": r"teacher targets: expected finite values, got NaN, \+inf or no usable entry in 1 of .*valid row 3",
    "infinite log-sum-exp": r"teacher targets: expected finite values, .* log-sum-exp inf",
    "two logits": r"ids_NK: expected one logit an id, got \[.*\] for id \d+ in valid row 3; .*tail='sampled'",
    "low log-sum-exp": r"teacher_lse_N: expected the log-sum-exp .* in valid row 3, below .* the same temperature",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tail", ["bucket", "truncated", "renormalised"])
def test_targets_that_no_teacher_gives_are_refused(make_example, fault, tail):
    p = make_example().cast(torch.float32)
    targets, options = spoil(p, fault), {"tail": tail}
    with pytest.raises(ValueError, match=FAULTS[fault]):
        kk.linear_sparse_kl(p.hidden, p.weight, *targets, labels_N=p.labels, **options)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        kk.sparse_kl(p.hidden @ p.weight.T, *targets, labels_N=p.labels, **options)
    p.labels[4] = -100  # an ignored row may hold anything
    assert kk.linear_sparse_kl(p.hidden, p.weight, *targets, labels_N=p.labels, **options).loss_sum.isfinite()


@pytest.mark.parametrize("fault", FAULTS)
def test_where_a_check_would_wait_for_the_device_the_loss_is_nan(make_example, monkeypatch, fault):
    """As on a GPU: without the checks of values such a row poisons the loss, and no other row's gradient."""
    monkeypatch.setattr(arguments, "check_target_values", lambda *_: None)
    monkeypatch.setattr(arguments, "_check_entries", lambda *_: None)
    p = make_example().cast(torch.float32)
    loss = kk.linear_sparse_kl(p.hidden, p.weight, *spoil(p, fault), labels_N=p.labels).loss_sum
    (grad,) = torch.autograd.grad(loss, p.hidden)
    assert loss.isnan()
    assert grad.isnan().any(1).tolist() == [row == 4 for row in range(11)]


def test_rounded_targets_and_sampled_ones_pass():
    """A bf16 log-sum-exp lies below the top logit by rounding alone; sampled targets have none to compare with."""
    ids, logits = torch.tensor([[3, 1], [2, 0]]), torch.tensor([[20.03, -1.0], [40.07, -1.0]])
    lse = torch.logsumexp(logits, 1).bfloat16().float()
    assert bool((lse < logits[:, 0]).all())
    assert prepare_entries(ids, logits, lse, 5, 1.0).logp_NK.isfinite().all()
    repeated, weights = torch.tensor([[3, 3], [2, 0]]), torch.full((2, 2), 0.5)
    assert prepare_entries(repeated, logits, torch.zeros(2), 5, 1.0, weights).logp_NK[:, 0].isfinite().all()


OPS = {
    "linear_sparse_kl": lambda p, **o: kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, **o),
    "sparse_kl": lambda p, **o: kk.sparse_kl(p.hidden @ p.weight.T, *p.targets, labels_N=p.labels, **o),
    "linear_full_kl": lambda p: kk.linear_full_kl(
        p.hidden, p.weight, p.hidden.detach() + 1.0, p.weight.detach(), labels_N=p.labels
    ),
}


def in_batches(p):
    """The example's 12 rows as 3 sequences of 4."""
    rows = [t.detach().unflatten(0, (3, 4)) for t in (p.hidden, p.ids, p.logits, p.lse, p.labels)]
    weight = p.weight.detach().requires_grad_()
    return type(p)(rows[0].requires_grad_(), weight, p.bias, *rows[1:])


@pytest.mark.parametrize("op", OPS)
def test_sequences_of_a_batch_are_rows(make_example, op):
    p = make_example(rows=12).cast(torch.float32)
    batch = in_batches(p)
    rows, batched = OPS[op](p), OPS[op](batch)
    rows.loss_sum.backward()
    batched.loss_sum.backward()
    assert all(torch.equal(a, b) for a, b in zip(vars(rows).values(), vars(batched).values(), strict=True))
    assert torch.equal(batch.hidden.grad, p.hidden.grad.unflatten(0, (3, 4)))
    assert torch.equal(batch.weight.grad, p.weight.grad)


def test_sampled_weights_come_in_batches_too(make_example):
    p = make_example(rows=12).cast(torch.float32)
    weights = torch.rand(12, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    rows = OPS["linear_sparse_kl"](p, tail="sampled", target_weights_NK=weights)
    batched = OPS["linear_sparse_kl"](in_batches(p), tail="sampled", target_weights_NK=weights.view(3, 4, 7))
    assert torch.equal(rows.loss_sum, batched.loss_sum)


@pytest.mark.parametrize("rows", [12, 0])
def test_a_top_k_has_the_shape_of_its_rows(make_example, rows):
    p = make_example(rows=rows).cast(torch.float32)
    flat = kk.linear_topk_lse(p.hidden, p.weight, 5)
    batched = kk.linear_topk_lse(p.hidden.detach().unflatten(0, (3, rows // 3)), p.weight, 5)
    assert [list(field.shape) for field in batched] == [[3, rows // 3, 5], [3, rows // 3, 5], [3, rows // 3]]
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(batched, flat, strict=True))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": (12,)}, r"labels_N: expected \[3, 4\] to match hidden_NH, got \[12\]"),
        ({"labels": (4, 3)}, r"labels_N: expected \[3, 4\] to match hidden_NH, got \[4, 3\]"),
        ({"lse": (3, 4, 1)}, r"teacher_lse_N: expected \[3, 4\] to match"),
        ({"ids": (12, 7)}, r"ids_NK: expected \[3, 4, 'K'\] to match hidden_NH, got \[12, 7\]"),
    ],
)
def test_a_batch_of_another_shape_is_refused(make_example, change, match):
    batch = in_batches(make_example(rows=12).cast(torch.float32))
    batch = batch._replace(**{name: getattr(batch, name).reshape(shape) for name, shape in change.items()})
    with pytest.raises(ValueError, match=match):
        OPS["linear_sparse_kl"](batch)
