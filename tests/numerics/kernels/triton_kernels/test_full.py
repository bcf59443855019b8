"""The Triton kernel of linear_full_kl against fp64: in Triton's interpreter on a CPU, and the same table on a GPU.

See test_sparse.py for what the interpreter does not see.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import DIVERGENCES, Divergence, reference
from kdscale_kernels.rows import torch_full
from kdscale_kernels.types import LossOptions

full_op = importlib.import_module("kdscale_kernels.ops.linear_full_kl")  # the package shows the function of that name

INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


def chunk(*, rows=4, vocab=301, matched=None, seed=0):
    """(student's logits, teacher's, labels)."""
    gen = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, vocab, generator=gen) * 2
    z = torch.randn(rows, vocab, generator=gen) * 2
    z = z if matched is None else teacher + matched * z
    return z, teacher, torch.randint(0, vocab, (rows,), generator=gen)


def run(z, teacher, labels, options, device, *, teacher_softcap=None, want_grad=True, grad_dtype=None):
    """(sums, dz, the teacher's logits afterwards) on the CPU."""
    from kdscale_kernels.triton_kernels.full import full_step

    z, teacher = z.to(device).clone(), teacher.to(device).clone()
    sums, dz = full_step(
        z,
        teacher,
        labels.to(device),
        options,
        teacher_softcap=teacher_softcap,
        want_grad=want_grad,
        grad_dtype=grad_dtype,
    )
    assert dz.data_ptr() == z.data_ptr()
    return sums.cpu(), dz.cpu(), teacher.cpu()


def truth(z, teacher, labels, options, *, teacher_softcap=None):
    z, teacher = z.double(), teacher.double()
    return torch_full.full_step(z, teacher, labels, options, teacher_softcap=teacher_softcap, want_grad=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("matched", [None, 0.05])
@pytest.mark.parametrize(
    ("temperature", "ce_weight", "softcaps"),
    [(1.0, 0.0, (None, None)), (1.0, 0.3, (8.0, 5.0)), (2.5, 0.3, (None, 5.0)), (0.7, 1.0, (8.0, None))],
)
def test_every_loss_equals_fp64(device, divergence, matched, temperature, ce_weight, softcaps):
    """301 columns: a full block and part of one. bf16 dz lies over the logits, as right as bf16 can be."""
    z, teacher, labels = chunk(matched=matched)
    options = LossOptions(
        ce_weight, temperature, Divergence(divergence, {"jsd": 0.3}.get(divergence)), softcap=softcaps[0]
    )
    want_sums, want_dz = truth(z, teacher, labels, options, teacher_softcap=softcaps[1])
    for grad_dtype in (None, torch.bfloat16):
        sums, dz, after = run(z, teacher, labels, options, device, teacher_softcap=softcaps[1], grad_dtype=grad_dtype)
        torch.testing.assert_close(sums.double(), want_sums, rtol=1e-4, atol=1e-5)
        step = 0.0 if grad_dtype is None else 2.0**-7 if device == "cpu" else 2.0**-8  # the interpreter truncates
        torch.testing.assert_close(dz.double(), want_dz, rtol=step + 1e-4, atol=2e-6)
        assert torch.equal(after, teacher)
    quiet, _, _ = run(z, teacher, labels, options, device, teacher_softcap=softcaps[1], want_grad=False)
    torch.testing.assert_close(quiet, sums, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [1e-12, 1e-7, 1e-3, 1.0 - 1e-3, 1.0 - 1e-7])
@pytest.mark.parametrize("matched", [None, 0.05])
def test_jsd_keeps_its_digits_near_its_ends(device, beta, matched):
    z, teacher, labels = chunk(matched=matched)
    options = LossOptions(divergence=Divergence("jsd", beta))
    want_sums, want_dz = truth(z, teacher, labels, options)
    sums, dz, _ = run(z, teacher, labels, options, device)
    torch.testing.assert_close(sums[1].double(), want_sums[1], rtol=1e-4, atol=0)
    assert float((dz.double() - want_dz).norm() / want_dz.norm()) < 2e-5


@pytest.mark.parametrize("grad_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_same_bits_twice_and_rows_do_not_depend_on_each_other(device, divergence, grad_dtype):
    z, teacher, labels = chunk()
    options = LossOptions(ce_weight=0.3, divergence=Divergence(divergence), temperature=2.0)
    sums, dz, _ = run(z, teacher, labels, options, device, grad_dtype=grad_dtype)
    again = run(z, teacher, labels, options, device, grad_dtype=grad_dtype)
    assert torch.equal(sums, again[0])
    assert torch.equal(dz, again[1])
    for row in range(4):
        part = slice(row, row + 1)
        alone = run(z[part], teacher[part], labels[part], options, device, grad_dtype=grad_dtype)
        assert torch.equal(sums[:, part], alone[0])
        assert torch.equal(dz[part], alone[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_what_is_not_a_number_poisons_its_row_only(device, divergence, ce_weight):
    z, teacher, labels = chunk(rows=8)
    z[0, 270], z[1, 7], z[2] = NAN, INF, -INF
    teacher[3, 7], teacher[4], labels[5] = NAN, -INF, 999
    sums, dz, _ = run(z, teacher, labels, LossOptions(ce_weight, divergence=Divergence(divergence)), device)
    poisoned = [True] * 3 + [ce_weight < 1.0] * 2 + [ce_weight > 0.0, False, False]
    assert sums[0].isnan().tolist() == poisoned
    assert dz.isnan().all(1).tolist() == dz.isnan().any(1).tolist() == poisoned
    assert sums[1].isnan().tolist() == [True] * 5 + [False] * 3
    assert sums[2].isnan().tolist() == [True] * 3 + [False] * 2 + [True, False, False]
    assert sums[3].isnan().tolist() == [False] * 3 + [True] * 3 + [False, False]
    assert not sums[4, :5].any()


def test_forbidden_and_vanishing_entries(device):
    rows = [
        ([1.0, 0.5, -INF, 0.0], [2.0, 1.0, -INF, -1.0]),
        ([1.0, 0.5, 0.25, 0.0], [2.0, 1.0, -INF, -1.0]),
        ([150.0, 149.0, -150.0, -150.0], [2.0, 1.0, 0.5, 0.5]),
        ([1.0, 0.5, 0.0, 0.0], [200.0, 199.0, -200.0, -200.0]),
    ]
    for divergence, temperature, ce_weight in itertools.product(DIVERGENCES, (1.0, 2.0), (0.0, 0.25)):
        kept = [row for i, row in enumerate(rows) if i != 1 or divergence != "reverse_kl"]  # infinite there
        z, teacher = (torch.tensor(side) for side in zip(*kept, strict=True))
        labels = torch.zeros(len(kept), dtype=torch.int64)
        options = LossOptions(ce_weight, temperature, Divergence(divergence))
        want_sums, want_dz = truth(z, teacher, labels, options)
        sums, dz, _ = run(z, teacher, labels, options, device)
        assert want_sums.isfinite().all()
        torch.testing.assert_close(sums.double(), want_sums, rtol=1e-4, atol=1e-5)
        # a skewed divergence's gradient is a difference of sums near one: fp32 leaves 1e-6 where fp64 leaves nothing
        torch.testing.assert_close(dz.double(), want_dz, rtol=1e-4, atol=3e-6 if "skew" in divergence else 1e-6)
        assert float(dz[0, 2]) == 0.0


@pytest.mark.parametrize("vocab", [1, 2, 256, 513])
def test_odd_vocabularies_ties_and_no_rows(device, vocab):
    z, teacher, labels = chunk(vocab=vocab)
    z[0], teacher[0] = 1.0, 2.0  # every id is a maximum: the first one is id 0 on both sides
    z[1, -1], teacher[1, -1] = 99.0, 98.0
    options = LossOptions(ce_weight=0.2, divergence=Divergence("jsd"))
    want_sums, want_dz = truth(z, teacher, labels, options)
    sums, dz, _ = run(z, teacher, labels, options, device)
    torch.testing.assert_close(sums.double(), want_sums, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dz.double(), want_dz, rtol=1e-4, atol=2e-6)
    assert sums[4, :2].tolist() == [1.0, 1.0]
    sums, dz, _ = run(z[:0], teacher[:0], labels[:0], options, device)
    assert (sums.shape, dz.shape) == ((5, 0), (0, vocab))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_op_equals_its_twin(device, divergence):
    """Through the products: both heads with biases, soft-caps and padding, ignored rows, chunks, a scaled loss."""
    gen = torch.Generator().manual_seed(1)
    shapes = ((9, 12), (130, 12), (130,), (9, 20), (140, 20), (140,))
    tensors = [torch.randn(shape, generator=gen) for shape in shapes]
    labels = torch.randint(0, 128, (9,), generator=gen)
    labels[4] = -100
    options = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.3, "vocab_size": 128}
    options |= {"softcap": 6.0, "teacher_softcap": 9.0}
    results = []
    for op, dtype, place, extra in (
        (kk, torch.float32, device, {"backend": "triton", "chunk_bytes": 3 * 2 * 4 * 128}),
        (reference, torch.float64, "cpu", {}),
    ):
        hidden, weight, bias, *teacher = (t.detach().to(place, dtype, copy=True) for t in tensors)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        result = op.linear_full_kl(
            hidden,
            weight,
            *teacher[:2],
            labels_N=labels.to(place),
            bias_V=bias,
            teacher_bias_V=teacher[2],
            **options,
            **extra,
        )
        (0.37 * result.loss_sum).backward()
        results.append((result, [leaf.grad.double().cpu() for leaf in leaves]))
    (got, actual), (want, expected) = results
    for field in ("loss_sum", "tokens", "kd_sum", "ce_sum", "teacher_ce_sum", "top1_agree_sum"):
        assert float(getattr(got, field).detach()) == pytest.approx(float(getattr(want, field).detach()), rel=1e-4)
    for grad, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("noise", [None, 0.05])
def test_bf16_gradients_reach_the_products(device, cuda_products, divergence, noise):
    """The CUDA route end to end on a CPU: bf16 operands, fp32 logits of both models, bf16 dz over the student's."""
    if device != "cpu":
        pytest.skip("a GPU has these products")
    gen = torch.Generator().manual_seed(3)
    x, y = (torch.randn(9, 32, generator=gen) for _ in range(2))
    weight, bias = 0.35 * torch.randn(300, 32, generator=gen), torch.randn(300, generator=gen)
    x = x if noise is None else y + noise * x
    half = [t.bfloat16() for t in (x, weight, bias, y)]
    labels = torch.randint(0, 300, (9,), generator=gen)
    labels[2] = -100
    grads = []
    for op, dtype, extra in (
        (kk, torch.bfloat16, {"backend": "triton", "chunk_bytes": 2 * 3 * 4 * 300}),
        (reference, torch.float64, {}),
    ):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in half[:3]]
        teacher = (half[3].to(dtype), half[1].to(dtype))
        options = {"labels_N": labels, "bias_V": leaves[2], "ce_weight": 0.2, "divergence": divergence, **extra}
        with cuda_products(full_op, True) if op is kk else contextlib.nullcontext():
            op.linear_full_kl(*leaves[:2], *teacher, **options).loss_sum.backward()
        grads.append([leaf.grad.double() for leaf in leaves])
    for actual, expected in zip(*grads, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 2e-2  # the interpreter truncates dz to bf16


def test_what_triton_cannot_do_is_refused_by_name(device):
    x, w = (torch.randn(n, 6, dtype=torch.float64, device=device) for n in (4, 30))
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(kk.BackendUnavailableError, match="fp64"):
        kk.linear_full_kl(x, w, x, w, labels_N=labels, backend="triton")
    from kdscale_kernels.triton_kernels.full import full_step

    z = torch.zeros(4, 30, device=device)
    with pytest.raises(ValueError, match="teacher_CV: expected fp32"):
        full_step(z, z.half(), labels, LossOptions(), teacher_softcap=None, want_grad=False)
