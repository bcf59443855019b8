"""How the ops sit in a training loop: memory, determinism, autocast, checkpointing, torch.func, torch.compile."""

from __future__ import annotations

import subprocess
import sys

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


def sparse(p, mode="auto"):
    return lambda h, w: kk.linear_sparse_kl(h, w, *p.targets, labels_N=p.labels, mode=mode).loss_sum


def targets_inside(p):
    """The teacher's pass and the choice of rows lie within the transform."""
    teacher = p.hidden.detach() + 1.0

    def loss(h, w):
        top = kk.linear_topk_lse(teacher, w.detach(), 7)
        return kk.linear_sparse_kl(h, w, *top, labels_N=p.labels + 0, mode="vocab_slices").loss_sum

    return loss


def on_logits(p):
    return lambda h, w: kk.sparse_kl(h @ w.T, *p.targets, labels_N=p.labels).loss_sum


def full(p):
    teacher = (p.hidden.detach() + 1.0, p.weight.detach().clone())
    return lambda h, w: kk.linear_full_kl(h, w, *teacher, labels_N=p.labels).loss_sum


LOSSES = {"sparse": sparse, "targets inside": targets_inside, "on logits": on_logits, "full": full}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_func_gives_what_backward_gives(make_example, loss, dtype):
    p = make_example().cast(dtype)
    function, h, w = LOSSES[loss](p), p.hidden.detach(), p.weight.detach()
    function(p.hidden, p.weight).backward()
    for got in (
        torch.func.grad(function, argnums=(0, 1))(h, w),
        torch.func.vjp(function, h, w)[1](torch.ones((), dtype=torch.float32)),
        torch.func.grad(function, argnums=(0, 1))(p.hidden, p.weight),  # which require gradients outside as well
    ):
        assert torch.equal(got[0], p.hidden.grad)
        assert torch.equal(got[1], p.weight.grad)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (lambda f, h, w: torch.func.grad(lambda x: torch.func.grad(f)(x, w).square().sum())(h), "once only"),
        (lambda f, h, w: torch.func.grad(f)(h.clone().requires_grad_(), w).sum().backward(), "once only"),
        (lambda f, h, w: torch.func.jvp(f, (h, w), (h, w)), "forward-mode"),
        (lambda f, h, w: torch.func.hessian(f)(h, w), r"forward-mode|vmap"),
        (lambda f, h, w: torch.func.vmap(lambda x: f(x, w))(torch.stack([h, h])), "vmap"),
        (lambda f, h, w: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(h, torch.stack([w, w])), "vmap"),
    ],
)
def test_what_torch_func_cannot_have_is_refused_in_words(make_example, loss, transform, match):
    """Second derivatives would else be zero, without a word."""
    p = make_example().cast(torch.float32)
    with pytest.raises(RuntimeError, match=f"({match}).*reference"):
        transform(LOSSES[loss](p), p.hidden.detach(), p.weight.detach())


def test_logits_are_not_overwritten_in_torch_func(make_example):
    p = make_example().cast(torch.float32)
    with pytest.raises(ValueError, match=r"inplace_grad: .* leave it out"):
        torch.func.grad(lambda z: kk.sparse_kl(z, *p.targets, labels_N=p.labels, inplace_grad=True).loss_sum)(
            torch.zeros(11, 203)
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_compiled_model_leaves_the_op_as_it_is(make_example, loss):
    p = make_example().cast(torch.float32)
    function = LOSSES[loss](p)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"torch\.compile cannot trace them: without fullgraph=True"):
        torch.compile(function, backend="eager", fullgraph=True)(p.hidden, p.weight)
    around = torch.compile(lambda h, w: function(h * 2.0, w) * 3.0, backend="eager")(p.hidden, p.weight)
    assert torch.equal(around, function(p.hidden * 2.0, p.weight) * 3.0)


def test_an_op_does_not_load_the_compiler():
    code = (
        "import sys, torch, kdscale_kernels as kk;"
        "kk.linear_topk_lse(torch.ones(2, 3), torch.ones(4, 3), 1); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True)
