"""linear_full_kl against its twin in fp64: all divergences, both regimes, the traps, and its place in a loop."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kdscale_kernels as kk
from kdscale_kernels import DIVERGENCES, Divergence, reference
from kdscale_kernels.rows import torch_full, torch_steps

SUMS = ("loss_sum", "tokens", "kd_sum", "ce_sum", "teacher_ce_sum", "top1_agree_sum")
INF, NAN = float("inf"), float("nan")


class Pair(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: tuple[Tensor, Tensor, Tensor]
    labels: Tensor

    def cast(self, dtype, *, grad=True):
        """Fresh leaves in dtype; the teacher's too, but for gradients."""
        own = [t.detach().to(dtype).clone().requires_grad_(grad) for t in self[:3]]
        return Pair(*own, tuple(t.detach().to(dtype) for t in self.teacher), self.labels)

    @property
    def leaves(self):
        return self[:3]


def make_pair(rows=9, hidden=24, vocab=203, teacher_vocab=None, noise=None, dtype=torch.float32, seed=0, spread=0.5):
    """noise None: unrelated models of different hidden sizes; else the student is the teacher plus noise."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).double()

    wide = teacher_vocab or vocab
    if noise is None:
        teacher = (normal(rows, hidden + 8), normal(wide, hidden + 8) * spread, normal(wide))
        own = (normal(rows, hidden), normal(vocab, hidden) * spread, normal(vocab))
    else:
        teacher = (normal(rows, hidden), normal(wide, hidden) * spread, normal(wide))
        own = (teacher[0] + noise * normal(rows, hidden), teacher[1][:vocab].clone(), teacher[2][:vocab].clone())
    own, teacher = (tuple(t.to(dtype).double() for t in side) for side in (own, teacher))
    labels = torch.randint(0, min(vocab, wide), (rows,), generator=gen)
    if rows > 3:
        labels[3] = -100
    return Pair(*own, teacher, labels)


def call(op, p, *, bias=False, **options):
    hidden, weight, head_bias = p.teacher
    if bias:
        options |= {"bias_V": p.bias, "teacher_bias_V": head_bias}
    return op.linear_full_kl(p.hidden, p.weight, hidden, weight, labels_N=p.labels, **options)


def naive(p, dtype, **options):
    """The twin's mathematics with logits and everything after in dtype: what plain code in that dtype gives."""
    q = p.cast(dtype)
    call(reference, q, **options).loss_sum.backward()
    return q


def distance(got, want):
    return float((got.detach().double().cpu() - want.detach().double()).norm() / want.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [None, 0.3, 0.05])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.3), (2.5, 0.3), (0.7, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_the_truth_than_plain_code(divergence, noise, temperature, ce_weight, dtype):
    p = make_pair(noise=noise, dtype=dtype)
    options = {
        "divergence": Divergence(divergence, {"jsd": 0.3}.get(divergence)),
        "temperature": temperature,
        "ce_weight": ce_weight,
    }
    truth, actual = p.cast(torch.float64), p.cast(dtype)
    want = call(reference, truth, **options)
    want.loss_sum.backward()
    got = call(kk, actual, chunk_bytes=3 * 4 * 203 * torch_full.full_buffers(203), **options)
    got.loss_sum.backward()
    plain = naive(p, dtype, **options)
    for field in SUMS:
        torch.testing.assert_close(
            getattr(got, field).detach().double(), getattr(want, field).detach().double(), rtol=2e-5, atol=2e-5
        )
    for own, other, exact in zip(actual.leaves[:2], plain.leaves[:2], truth.leaves[:2], strict=True):
        assert own.grad.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-3  # bf16: the last rounding, to the leaf's dtype
        assert distance(own.grad, exact.grad) <= distance(other.grad, exact.grad) + tolerance


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [None, 0.3])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.4)])
@pytest.mark.parametrize("softcaps", [(None, None), (3.0, None), (2.0, 4.0)])
def test_fp64_equals_the_twin(monkeypatch, divergence, noise, temperature, ce_weight, softcaps):
    """Biases, soft-caps on either side, heads padded to different sizes, several blocks of columns and chunks."""
    monkeypatch.setattr(torch_full, "BLOCK_COLUMNS", 64)
    divergence = Divergence(divergence, 0.2 if "skewed" in divergence else None)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight, "vocab_size": 190}
    options |= {"bias": True, "softcap": softcaps[0], "teacher_softcap": softcaps[1]}
    p, twin = (make_pair(noise=noise, teacher_vocab=210).cast(torch.float64) for _ in range(2))
    got, want = call(kk, p, chunk_bytes=190 * 8 * 24, **options), call(reference, twin, **options)
    for side in (got, want):
        (side.loss_sum * 0.37).backward()
    for field in SUMS:
        torch.testing.assert_close(getattr(got, field), getattr(want, field), check_dtype=False)
    for actual, expected in zip(p.leaves, twin.leaves, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-11)
    assert not p.weight.grad[190:].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    p = make_pair(rows=5, hidden=3, vocab=11).cast(torch.float64)

    def loss(op):
        def run(hidden, weight, bias):
            q = p._replace(hidden=hidden, weight=weight, bias=bias)
            options = {"divergence": divergence, "temperature": 1.7, "ce_weight": 0.3, "softcap": 6.0}
            return call(op, q, bias=True, **options).loss_sum

        return run

    assert torch.autograd.gradcheck(loss(reference), p.leaves)
    assert torch.autograd.gradcheck(loss(kk), p.leaves)


def rows_of(student, teacher, label=0, **options):
    """(sums, dz) of logits given as lists of rows, by way of identity heads."""
    z, t = torch.tensor(student), torch.tensor(teacher)
    eye, z = torch.eye(z.shape[1]), z.requires_grad_()
    got = kk.linear_full_kl(z, eye, t, eye, labels_N=torch.full((len(z),), label), **options)
    got.loss_sum.backward()
    return got, z.grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_nan_logit_poisons_its_row(divergence, ce_weight):
    p = make_pair().cast(torch.float32)
    p.hidden.data[5, 2] = NAN
    got = call(kk, p, divergence=divergence, ce_weight=ce_weight)
    got.loss_sum.backward()
    assert got.loss_sum.isnan()
    assert got.kd_sum.isnan()
    assert p.hidden.grad[5].isnan().all()
    assert p.hidden.grad[[0, 1, 2, 3, 4, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_teacher_row_without_numbers_is_a_readable_error(broken):
    p = make_pair().cast(torch.float32)
    p.teacher[0][4] = broken  # signs of the head's weights make it NaN or both infinities
    with pytest.raises(ValueError, match=r"teacher_hidden.*1 of 8 valid rows.*valid row 3"):
        call(kk, p)
    p.labels[4] = -100  # an ignored row may hold anything
    assert call(kk, p).loss_sum.isfinite()
    bias = torch.full((203,), -INF)
    with pytest.raises(ValueError, match="7 of 7 valid rows"):
        kk.linear_full_kl(p.hidden, p.weight, *p.teacher[:2], labels_N=p.labels, teacher_bias_V=bias)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forbidden_and_vanishing_entries(divergence, temperature):
    """-inf on both sides, -inf on the teacher's side alone, probabilities that fp32 cannot hold: as fp64 has them."""
    student = [[1.0, 0.5, 0.25, 0.0], [150.0, 149.0, -150.0, -150.0], [1.0, 0.5, 0.0, 0.0]]
    teacher = [[2.0, 1.0, 0.0, -1.0], [2.0, 1.0, 0.5, 0.5], [200.0, 199.0, -200.0, -200.0]]
    eye, labels = torch.eye(4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": 0.25}
    both, some = torch.tensor([0.0, 0.0, -INF, 0.0]), torch.zeros(4)
    for bias, teacher_bias in ((both, both), (some, both), (some, some)):
        if divergence == "reverse_kl" and bias is not teacher_bias:
            continue  # infinite
        biases = {"bias_V": bias, "teacher_bias_V": teacher_bias}
        z = torch.tensor(student).requires_grad_()
        got = kk.linear_full_kl(
            z, eye.float(), torch.tensor(teacher), eye.float(), labels_N=labels, **biases, **options
        )
        got.loss_sum.backward()
        wide = torch.tensor(student, dtype=torch.float64).requires_grad_()
        biases = {name: value.double() for name, value in biases.items()}
        exact = kk.linear_full_kl(wide, eye, torch.tensor(teacher).double(), eye, labels_N=labels, **biases, **options)
        exact.loss_sum.backward()
        assert got.loss_sum.isfinite()
        torch.testing.assert_close(got.loss_sum.double(), exact.loss_sum, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(z.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
        if bias is both:
            assert not z.grad[:, 2].any()


def test_infinite_losses_are_said_so():
    """Forward KL where the student forbids, with the gradient q - p; reverse KL where the teacher does."""
    open_row, shut = [1.0, 0.5, 0.25], [1.0, 0.5, -3e38]
    infinite = torch.tensor([0.0, 0.0, -INF])
    z = torch.tensor([open_row]).requires_grad_()
    eye, labels = torch.eye(3), torch.tensor([0])
    got = kk.linear_full_kl(z, eye, torch.tensor([open_row]), eye, labels_N=labels, bias_V=infinite)
    got.loss_sum.backward()
    assert float(got.loss_sum.detach()) == INF
    want = torch.softmax(torch.tensor([1.0, 0.5, -INF]), 0) - torch.softmax(torch.tensor(open_row), 0)
    torch.testing.assert_close(z.grad[0], want)
    got, _ = rows_of([open_row], [shut], divergence="reverse_kl")
    assert got.loss_sum > 1e30
    got = kk.linear_full_kl(
        z, eye, z.detach(), eye, labels_N=labels, teacher_bias_V=infinite, divergence="reverse_kl", ce_weight=1.0
    )
    z.grad = None
    got.loss_sum.backward()  # weight zero: the infinite part takes no part
    assert float(got.kd_sum) == INF
    torch.testing.assert_close(z.grad[0], torch.softmax(torch.tensor(open_row), 0) - torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 2), (5, 41), (2, 1271)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_awkward_shapes(rows, vocab, divergence):
    p = make_pair(rows=rows, hidden=6, vocab=vocab)
    for chunk_bytes in (1, 1 << 20):
        actual, truth = p.cast(torch.float32), p.cast(torch.float64)
        got = call(kk, actual, divergence=divergence, chunk_bytes=chunk_bytes, ce_weight=0.2)
        want = call(reference, truth, divergence=divergence, ce_weight=0.2)
        (got.loss_sum + want.loss_sum).backward()
        torch.testing.assert_close(got.loss_sum.double(), want.loss_sum, rtol=1e-4, atol=1e-5)
        for own, exact in zip(actual.leaves[:2], truth.leaves[:2], strict=True):
            torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_valid_gives_zero_and_zero_gradients(rows):
    p = make_pair(rows=rows).cast(torch.float32)
    p.labels[:] = -100
    for op in (kk, reference):
        p.hidden.grad = p.weight.grad = None
        result = call(op, p, ce_weight=0.5)
        result.loss_sum.backward()
        assert [float(getattr(result, field).detach()) for field in SUMS] == [0.0] * len(SUMS)
        assert not p.weight.grad.any()
        assert not p.hidden.grad.any()


def test_equal_models_have_no_divergence():
    p = make_pair(noise=0.0).cast(torch.float32)
    for divergence in DIVERGENCES:
        p.hidden.grad = None
        same = call(kk, p, divergence=divergence)
        same.loss_sum.backward()
        assert abs(float(same.kd_sum)) < 1e-5
        assert float(p.hidden.grad.abs().max()) < 1e-5
        assert int(same.top1_agree_sum) == int(same.tokens) == 8
        assert torch.equal(same.ce_sum, same.teacher_ce_sum)


def test_the_lower_id_is_first_among_equal_logits():
    got, _ = rows_of([[1.0, 3.0, 3.0], [3.0, 1.0, 3.0]], [[0.0, 5.0, 5.0], [0.0, 0.0, 9.0]])
    assert int(got.top1_agree_sum) == 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_entry_listed_is_the_full_loss(divergence):
    """linear_sparse_kl with K = V gives the same loss and gradient."""
    p, q = (make_pair().cast(torch.float32) for _ in range(2))
    options = {"divergence": divergence, "ce_weight": 0.3, "temperature": 2.0}
    top = kk.linear_topk_lse(*p.teacher[:2], 203, temperature=2.0)
    sparse = kk.linear_sparse_kl(q.hidden, q.weight, *top, labels_N=q.labels, **options)
    full = call(kk, p, **options)
    (sparse.loss_sum + full.loss_sum).backward()
    for field in ("loss_sum", "kd_sum", "ce_sum", "top1_agree_sum"):
        torch.testing.assert_close(getattr(full, field), getattr(sparse, field), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.weight.grad, q.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice(dtype):
    runs = []
    for _ in range(2):
        p = make_pair(rows=20, noise=0.1, dtype=dtype).cast(dtype)
        loss = call(kk, p, divergence="jsd", ce_weight=0.3, temperature=2.0, chunk_bytes=8 * 203 * 4 * 14).loss_sum
        loss.backward()
        runs.append((loss.detach(), p.hidden.grad, p.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_grad_and_frozen_sides_make_no_gradient(monkeypatch):
    p = make_pair().cast(torch.float32)
    wanted = []
    step = torch_full.full_step

    def spy(*args, **options):
        wanted.append(options["want_grad"])
        return step(*args, **options)

    monkeypatch.setattr(torch_steps.TorchRowSteps, "full", staticmethod(spy))
    with torch.no_grad():
        quiet = call(kk, p)
    assert not quiet.loss_sum.requires_grad
    torch.testing.assert_close(quiet.loss_sum, call(kk, p).loss_sum.detach())
    p.weight.requires_grad_(False)
    teacher = p.teacher[0].requires_grad_()
    call(kk, p).loss_sum.backward()
    assert p.weight.grad is None
    assert teacher.grad is None  # a constant
    assert p.hidden.grad.any()
    assert wanted == [False, True, True]


def test_double_backward_is_refused():
    p = make_pair().cast(torch.float32)
    with pytest.raises(RuntimeError, match="linear_full_kl can be differentiated once only"):
        torch.autograd.grad(call(kk, p).loss_sum, p.hidden, create_graph=True)


def test_autocast_multiplies_in_bf16_and_keeps_master_gradients():
    p = make_pair(rows=16, hidden=32).cast(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(kk, p).loss_sum
    loss.backward()
    assert loss.dtype == p.weight.grad.dtype == torch.float32
    rounded = p.cast(torch.bfloat16)
    other = call(kk, rounded).loss_sum
    other.backward()
    torch.testing.assert_close(loss, other, rtol=2e-3, atol=1e-3)
    assert distance(rounded.weight.grad.float(), p.weight.grad) < 2e-2


def test_an_fp64_side_makes_both_fp64():
    p, q = make_pair(), make_pair()
    mixed = p.cast(torch.float32, grad=False)._replace(teacher=p.cast(torch.float64).teacher)
    got, want = call(kk, mixed), call(reference, q.cast(torch.float64, grad=False))
    assert got.loss_sum.dtype == torch.float64
    torch.testing.assert_close(got.loss_sum, want.loss_sum)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ce_weight": 1.5}, "ce_weight"),
        ({"divergence": "kl"}, "divergence"),
        ({"teacher_softcap": 0.0}, "teacher_softcap"),
        ({"vocab_size": 204}, "vocab_size"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, "labels_N"),
        ({"labels_N": torch.zeros(9)}, "labels_N: expected integers"),
        ({"labels_N": torch.full((9,), 203)}, "labels_N: expected ids from 0 to 202"),
        ({"teacher_bias_V": torch.zeros(3)}, "teacher_bias_V"),
        ({"teacher_hidden_NG": torch.zeros(3, 32)}, r"teacher_hidden: expected \[9, G\]"),
        ({"teacher_weight_VG": torch.zeros(204, 32)}, "vocab_size: the heads have 203 .* and 204"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_arguments_are_named(change, match):
    p = make_pair().cast(torch.float32)
    arguments = {"teacher_hidden_NG": p.teacher[0], "teacher_weight_VG": p.teacher[1], "labels_N": p.labels}
    with pytest.raises(ValueError, match=match):
        kk.linear_full_kl(p.hidden, p.weight, **{**arguments, **change})
