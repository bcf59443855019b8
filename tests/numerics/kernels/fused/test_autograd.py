"""How the ops sit in a training loop: memory, determinism, no_grad, autocast, accumulation, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import kdscale_kernels as kk


class Largest(TorchDispatchMode):
    """The largest tensor any operation made; views of the tensors in `known` are not made but given."""

    def __init__(self, *known):
        super().__init__()
        self.numel, self.known = 0, {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        made = [t for t in made if t.untyped_storage().data_ptr() not in self.known]
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in made]
        self.numel = max([self.numel, *sizes])
        return out


def loss_of(p, **options):
    return kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, **options).loss_sum


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "ce_weight": 0.5, "softcap": 9.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_by_vocabulary_array(make_example, options, dtype):
    p = make_example(rows=256, hidden=4, vocab=2048, k=4).cast(dtype)
    chunk_bytes = 16 * 2048 * 4
    with Largest() as largest:
        kk.linear_topk_lse(p.hidden, p.weight, 4, chunk_bytes=chunk_bytes)
        loss_of(p, chunk_bytes=chunk_bytes, **options).backward()
        teacher = (p.hidden.detach(), p.weight.detach())
        full = kk.linear_full_kl(p.hidden, p.weight, *teacher, labels_N=p.labels, chunk_bytes=chunk_bytes, **options)
        full.loss_sum.backward()
    assert 0 < largest.numel <= 16 * 2048 < 256 * 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice(make_example, dtype):
    runs = []
    for _ in range(2):
        p = make_example(rows=40, noise=0.1).cast(dtype)
        loss = loss_of(p, ce_weight=0.3, temperature=2.0, chunk_bytes=8 * 203 * 4)
        loss.backward()
        runs.append((loss.detach(), p.hidden.grad, p.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_grad_makes_no_gradient(make_example):
    p = make_example().cast(torch.float32)
    with torch.no_grad():
        quiet = loss_of(p)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, loss_of(p).detach())


def test_frozen_weight_gets_none_and_costs_no_gradient_array(make_example):
    p = make_example(rows=4, hidden=64, vocab=512).cast(torch.float32)
    p.weight.requires_grad_(False)
    with Largest(p.weight) as largest:
        loss_of(p, chunk_bytes=2 * 512 * 4).backward()
    assert p.weight.grad is None
    assert p.hidden.grad.any()
    assert largest.numel < 512 * 64


def test_accumulation_adds(make_example):
    p = make_example(rows=12).cast(torch.float32)
    loss_of(p).backward()
    whole = p.weight.grad.clone()
    p.weight.grad = None
    for part in (slice(0, 5), slice(5, 12)):
        targets = [t[part] for t in p.targets]
        kk.linear_sparse_kl(p.hidden[part], p.weight, *targets, labels_N=p.labels[part]).loss_sum.backward()
    torch.testing.assert_close(p.weight.grad, whole)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(make_example, reentrant):
    p, q = (make_example().cast(torch.float32) for _ in range(2))
    loss_of(p).backward()
    checkpoint(
        lambda h, w: kk.linear_sparse_kl(h, w, *q.targets, labels_N=q.labels).loss_sum,
        q.hidden,
        q.weight,
        use_reentrant=reentrant,
    ).backward()
    assert torch.equal(p.hidden.grad, q.hidden.grad)
    assert torch.equal(p.weight.grad, q.weight.grad)


def test_backward_twice_with_retained_graph(make_example):
    p = make_example().cast(torch.float32)
    loss = loss_of(p)
    (once,) = torch.autograd.grad(loss, p.weight, retain_graph=True)
    (twice,) = torch.autograd.grad(loss * 2.0, p.weight)
    torch.testing.assert_close(twice, 2.0 * once)


def test_a_loss_taken_as_it_is_twice_adds_up(make_example):
    """A factor of one hands the gradient on without a copy: what .grad holds must still be its own."""
    p, q = (make_example().cast(torch.float32) for _ in range(2))
    loss = loss_of(p)
    for last in (False, False, True):
        loss.backward(retain_graph=not last)
    (3.0 * loss_of(q)).backward()
    torch.testing.assert_close(p.weight.grad, q.weight.grad)
    torch.testing.assert_close(p.hidden.grad, q.hidden.grad)


def test_a_factor_of_one_makes_no_copy(make_example):
    """On a CPU the weight's gradient is the one array that the forward made."""
    p = make_example().cast(torch.float32)
    loss = loss_of(p)
    made = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert p.weight.grad.data_ptr() == made


def test_double_backward_is_refused(make_example):
    p = make_example().cast(torch.float32)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(loss_of(p), p.hidden, create_graph=True)


def test_autocast_multiplies_in_bf16_and_keeps_master_gradients(make_example):
    """fp32 weights under autocast: what rounded operands give, gradients in the parameters' own dtype."""
    p = make_example(rows=16, hidden=32, dtype=torch.float32).cast(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(p)
    loss.backward()
    assert loss.dtype == p.weight.grad.dtype == p.hidden.grad.dtype == torch.float32
    rounded = p._replace(
        hidden=p.hidden.detach().bfloat16().requires_grad_(), weight=p.weight.detach().bfloat16().requires_grad_()
    )
    other = loss_of(rounded)
    other.backward()
    torch.testing.assert_close(loss, other, rtol=2e-3, atol=1e-3)
    error = (p.weight.grad - rounded.weight.grad.float()).norm() / p.weight.grad.norm()
    assert float(error) < 2e-2


def test_precision_setting_is_put_back(make_example):
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(setting, "fp32_precision"):
        pytest.skip("torch before 2.9 has no such setting")
    before = setting.fp32_precision
    loss_of(make_example().cast(torch.bfloat16)).backward()
    assert setting.fp32_precision == before
