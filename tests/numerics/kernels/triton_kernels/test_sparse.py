"""The Triton kernels against the fp64 twins: in Triton's interpreter on a CPU, and the same table on a GPU.

The interpreter sees neither races nor spills, and rounds fp32 to bf16 by truncation, so its bf16 tolerances are wider.
tests/conftest.py asks for it before anything imports triton, unless the machine has a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import DIVERGENCES, Divergence, reference
from kdscale_kernels import backend as kernels_backend
from kdscale_kernels.fused import row_chunks
from kdscale_kernels.rows import teacher_entries, torch_sparse
from kdscale_kernels.types import LossOptions

INF, NAN = float("inf"), float("nan")
TAILS = ("bucket", "truncated", "renormalised")
SUMS = ("loss_sum", "kd_sum", "ce_sum", "teacher_mass_sum", "student_tail_sum", "top1_agree_sum")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


def put(example, device, *, grad=True):
    """The example's tensors on a device; what the student owns as fresh leaves."""
    moved = [t.detach().to(device) for t in example]
    return type(example)(*[t.requires_grad_(grad) for t in moved[:3]], *moved[3:])


def near(got, want, tol):
    scale = want.detach().abs().max().clamp(min=1e-30)
    return float((got.detach().double().cpu() - want.detach()).abs().max() / scale) <= tol


def check_against_twin(example, device, *, tol=1e-4, dtype=torch.float32, head=(), of_op=None, **mode):
    """`of_op`: options that the twin does not have."""
    head = dict(head)
    use_bias = head.pop("with_bias", False)
    p, twin = put(example.cast(dtype), device), example.cast(torch.float64)
    results = []
    for module, q, extra in (
        (kk, p, {"backend": "triton", "chunk_bytes": 4 * 4 * p.weight.shape[0], **(of_op or {})}),
        (reference, twin, {}),
    ):
        result = module.linear_sparse_kl(
            q.hidden,
            q.weight,
            *q.targets,
            labels_N=q.labels,
            bias_V=q.bias if use_bias else None,
            **head,
            **mode,
            **extra,
        )
        (result.loss_sum * 0.37).backward()
        results.append(result)
    got, want = results
    assert int(got.tokens) == int(want.tokens)
    for field in SUMS:
        value, truth = getattr(got, field).detach().double().cpu(), getattr(want, field).detach()
        assert abs(value - truth) <= tol * max(1.0, abs(truth)), field
    for actual, expected in zip(p[:3], twin[:3], strict=True):
        assert (actual.grad is None) == (expected.grad is None)
        if actual.grad is not None:
            assert near(actual.grad, expected.grad, tol)


def every_two(*columns):
    """Rows in which every two values of different columns meet: in the interpreter the whole product takes minutes.

    Every pair of values of the first two columns has a part of the product of the others, in turn.
    """
    first, second, *others = columns
    combined = list(itertools.product(*others))
    share = -(-len(combined) // len(second))
    return [
        (one, two, *combined[(share * (i + j) + part) % len(combined)])
        for i, one in enumerate(first)
        for j, two in enumerate(second)
        for part in range(share)
    ]


@pytest.mark.parametrize(
    ("divergence", "tail", "noise", "temperature_and_ce_weight"),
    every_two(DIVERGENCES, TAILS, (None, 0.05), ((1.0, 0.0), (1.0, 0.3), (2.5, 0.3))),
)
def test_every_loss_equals_its_twin(make_example, device, divergence, tail, noise, temperature_and_ce_weight):
    temperature, ce_weight = temperature_and_ce_weight
    example = make_example(rows=5, noise=noise, temperature=temperature)
    mode = {"divergence": Divergence(divergence, {"jsd": 0.3}.get(divergence)), "tail": tail, "ce_weight": ce_weight}
    check_against_twin(example, device, head={"temperature": temperature}, **mode)


@pytest.mark.parametrize("mode", ["row_chunks", "vocab_slices"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_rows_may_have_ce_weights_of_their_own(make_example, device, divergence, temperature, mode):
    example = make_example(rows=5, noise=0.3, temperature=temperature)
    weights = torch.tensor([0.0, 0.3, 1.0, 0.75, 0.2]).to(device)
    head = {"temperature": temperature, "softcap": 5.0}
    check_against_twin(example, device, head=head, divergence=divergence, ce_weight=weights, of_op={"mode": mode})


@pytest.mark.parametrize("beta", [1e-7, 1.0 - 1e-7])
def test_jsd_keeps_its_digits_near_its_ends(make_example, device, beta):
    check_against_twin(make_example(rows=5, noise=0.05), device, divergence=Divergence("jsd", beta))


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_sampled_targets_equal_the_torch_path(make_example, device, ce_weight):
    example = make_example(rows=5, noise=0.3)
    results = []
    for backend in ("triton", "torch"):
        p = put(example.cast(torch.float32), device)
        ids, logits, lse = p.targets
        weights = 1.3 * (logits - lse[:, None]).exp()  # their sum is not one
        result = kk.linear_sparse_kl(
            p.hidden,
            p.weight,
            ids,
            logits,
            lse,
            labels_N=p.labels,
            tail="sampled",
            target_weights_NK=weights,
            ce_weight=ce_weight,
            backend=backend,
        )
        result.loss_sum.backward()
        results.append((result, p.hidden.grad, p.weight.grad))
    (got, *actual), (want, *expected) = results
    for field in SUMS:
        assert float(getattr(got, field)) == pytest.approx(float(getattr(want, field)), rel=1e-4, abs=1e-4), field
    assert all(near(a, b.double().cpu(), 1e-4) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("divergence", "ce_weight", "temperature"), every_two(DIVERGENCES, (0.0, 0.4, 1.0), (1.0, 0.7))
)
def test_soft_cap_bias_and_padded_vocabulary(make_example, device, divergence, ce_weight, temperature):
    head = {"temperature": temperature, "softcap": 5.0, "with_bias": True, "vocab_size": 190}
    example = make_example(rows=5, noise=0.3, **head)
    check_against_twin(example, device, head=head, divergence=divergence, ce_weight=ce_weight, tol=2e-4)


@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 2, 1), (5, 41, 3), (4, 401, 33), (4, 64, 64), (2, 699, 5)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_awkward_shapes(make_example, device, rows, vocab, k, divergence):
    example = make_example(rows=rows, hidden=8, vocab=vocab, k=k, spread=0.5)
    check_against_twin(example, device, divergence=divergence, ce_weight=0.2, tol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("noise", [None, 0.3, 0.05])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_operands_keep_the_gradients_digits(make_example, device, divergence, noise):
    if device == "cpu":
        pytest.skip("bf16 products with fp32 results next to half gradients are a CUDA path")
    example = make_example(rows=48, hidden=64, vocab=1000, k=16, noise=noise, spread=0.35, dtype=torch.bfloat16, seed=3)
    p, twin = put(example.cast(torch.bfloat16), device), example.cast(torch.float64)
    options = {"divergence": divergence}
    kk.linear_sparse_kl(
        p.hidden, p.weight, *p.targets, labels_N=p.labels, chunk_bytes=64000, **options
    ).loss_sum.backward()
    reference.linear_sparse_kl(
        twin.hidden, twin.weight, *twin.targets, labels_N=twin.labels, **options
    ).loss_sum.backward()
    for actual, expected in ((p.hidden.grad, twin.hidden.grad), (p.weight.grad, twin.weight.grad)):
        assert float((actual.double().cpu() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("adds_in_place", [True, False])
@pytest.mark.parametrize("noise", [None, 0.05])
def test_bf16_gradients_reach_the_products(make_example, device, cuda_products, noise, adds_in_place):
    """The CUDA route end to end on a CPU, with the products that only CUDA has replaced by what they compute."""
    if device != "cpu":
        pytest.skip("a GPU has these products")

    example = make_example(rows=9, hidden=32, vocab=300, k=6, noise=noise, spread=0.35, dtype=torch.bfloat16, seed=3)
    p, twin = example.cast(torch.bfloat16), example.cast(torch.float64)
    with cuda_products(row_chunks, adds_in_place):
        options = {"labels_N": p.labels, "bias_V": p.bias, "ce_weight": 0.2}
        kk.linear_sparse_kl(
            p.hidden, p.weight, *p.targets, **options, backend="triton", chunk_bytes=3 * 4 * 300
        ).loss_sum.backward()
    options["bias_V"] = twin.bias
    reference.linear_sparse_kl(twin.hidden, twin.weight, *twin.targets, **options).loss_sum.backward()
    for actual, expected in zip(p[:3], twin[:3], strict=True):
        error = (actual.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert float(error) < 2e-2  # the interpreter truncates dz to bf16: twice the error, all of one sign


def moved(entries, device, dtype=None):
    """The entries on a device, their floating-point values in `dtype`."""
    return teacher_entries.TeacherEntries(
        *(t if t is None else t.to(device, dtype=dtype if t.is_floating_point() else None) for t in entries)
    )


def chunk(device, *, rows=5, vocab=301, k=6, temperature=1.0, seed=0, matched=None):
    """(z, targets, labels) on the device, z fp32."""
    gen = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, vocab, generator=gen) * 2
    z = torch.randn(rows, vocab, generator=gen) * 2
    z = z if matched is None else teacher + matched * z
    values, ids = teacher.topk(k, 1)
    prepared = teacher_entries.prepare_entries(ids, values, (teacher / temperature).logsumexp(1), vocab, temperature)
    labels = torch.randint(0, vocab, (rows,), generator=gen)
    labels[0] = ids[0, 0]
    return z.to(device), moved(prepared, device), labels.to(device)


@pytest.mark.parametrize(("divergence", "matched", "softcap"), every_two(DIVERGENCES, (None, 0.05), (None, 8.0)))
def test_a_bf16_gradient_lies_over_the_logits(device, divergence, matched, softcap):
    """bf16 dz in the first half of each fp32 row: as right as bf16 can be, in the same memory."""
    from kdscale_kernels.triton_kernels.sparse import sparse_step

    z, prepared, labels = chunk(device, matched=matched)
    options = LossOptions(ce_weight=0.3, divergence=Divergence(divergence), softcap=softcap)
    wide = z.double()
    double = moved(prepared, device, torch.float64)
    want_sums, _ = torch_sparse.sparse_step(wide, double, labels, options, want_grad=True)
    sums, dz = sparse_step(z, prepared, labels, options, want_grad=True, grad_dtype=torch.bfloat16)
    assert dz.dtype == torch.bfloat16
    assert dz.data_ptr() == z.data_ptr()
    torch.testing.assert_close(sums.double(), want_sums, rtol=1e-4, atol=1e-5)
    half_step = 2.0**-7 if device == "cpu" else 2.0**-8  # the interpreter truncates
    torch.testing.assert_close(dz.double(), wide, rtol=half_step * 1.01, atol=1e-6)


@pytest.mark.parametrize("grad_dtype", [None, torch.bfloat16])
def test_same_bits_twice_and_rows_do_not_depend_on_each_other(device, grad_dtype):
    from kdscale_kernels.triton_kernels.sparse import sparse_step

    z, prepared, labels = chunk(device, rows=4)
    options = LossOptions(ce_weight=0.3, divergence=Divergence("jsd"), temperature=2.0)

    def run(index):
        part = z[index].clone()
        step = sparse_step(part, prepared.rows(index), labels[index], options, want_grad=True, grad_dtype=grad_dtype)
        return [t.clone() for t in step]

    sums, dz = run(slice(0, 4))
    for again in (
        run(slice(0, 4)),
        [
            torch.cat(t, d)
            for t, d in zip(zip(*(run(slice(i, i + 1)) for i in range(4)), strict=True), (1, 0), strict=True)
        ],
    ):
        assert torch.equal(sums, again[0])
        assert torch.equal(dz, again[1])


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("where", ["support", "tail", "label", "id", "teacher"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_nan_or_bad_id_poisons_its_row_only(device, tail, where, ce_weight):
    from kdscale_kernels.triton_kernels.sparse import sparse_step

    z, prepared, labels = chunk(device)
    taken = {*prepared.ids_NK[2].tolist(), int(labels[2])}
    if where == "support":
        z[2, prepared.ids_NK[2, 1]] = NAN
    elif where == "tail":
        z[2, next(i for i in range(301) if i not in taken)] = NAN
    elif where == "label":
        labels[2] = 999
    elif where == "id":
        prepared.ids_NK[2, -1] = 999
    else:
        prepared.logp_NK[2] = NAN
    kept = z.clone()
    guard = torch.cat([z, torch.full_like(z, 7.0)])  # what an id out of range would have hit
    sums, dz = sparse_step(guard[:5], prepared, labels, LossOptions(ce_weight, tail=tail), want_grad=True)
    assert sums[2, 2].isnan() or where == "teacher"  # the cross-entropy asks nothing of the teacher
    if where != "label" or ce_weight:
        assert sums[0, 2].isnan()
        assert dz[2].isnan().any()
    others = [0, 1, 3, 4]
    assert sums[:, others].isfinite().all()
    assert dz[others].isfinite().all()
    assert (guard[5:] == 7.0).all()
    assert not torch.equal(kept[others], dz[others])


def test_tails_that_underflow(device):
    """Student tail e^-200, teacher tail 0, -inf in the student's tail, a soft-cap over -inf: as fp64 has them."""
    from kdscale_kernels.triton_kernels.sparse import sparse_step

    rows = [
        ([100.0, 99.0, -100.0, -100.0], [2.0, 1.0, 0.5, 0.5]),
        ([1.0, 0.5, 0.0, 0.0], [200.0, 199.0, -200.0, -200.0]),
        ([1.0, 0.5, -INF, 0.25], [2.0, 1.0, 0.0, -1.0]),
        ([10.0, 9.0, -12.0, -13.0], [2.0, 1.0, 0.0, -1.0]),
    ]
    student, teacher = (torch.tensor(side) for side in zip(*rows, strict=True))
    values, ids = teacher.topk(2, 1)
    labels = torch.zeros(4, dtype=torch.int64)
    for divergence, softcap in itertools.product(DIVERGENCES, (None, 20.0)):
        wide = student.double()
        lse = teacher.double().logsumexp(1)
        options = LossOptions(divergence=Divergence(divergence), softcap=softcap)
        (want_loss, *_), _ = torch_sparse.sparse_step(
            wide, teacher_entries.prepare_entries(ids, values.double(), lse, 4, 1.0), labels, options, want_grad=True
        )
        half = teacher_entries.prepare_entries(ids, values.double(), lse, 4, 1.0)
        half = moved(half, device, torch.float32)
        sums, dz = sparse_step(student.to(device).clone(), half, labels.to(device), options, want_grad=True)
        assert sums.isfinite().all()
        torch.testing.assert_close(sums[0].double().cpu(), want_loss, rtol=1e-4, atol=1e-5)
        # a skewed divergence's gradient is a difference of sums near one: fp32 leaves 1e-6 where fp64 leaves nothing
        torch.testing.assert_close(dz.double().cpu(), wide, rtol=1e-4, atol=2e-6 if "skew" in divergence else 1e-6)
        if softcap is None:
            assert float(dz[2, 2]) == 0.0


@pytest.mark.parametrize("tail", TAILS)
def test_empty_and_repeated_slots_change_nothing(make_example, device, tail):
    p = put(make_example(rows=4).cast(torch.float32), device, grad=False)
    logits = p.hidden @ p.weight.T
    results = []
    entry = torch.full((4, 1), -INF, device=device)
    ids = torch.cat([p.ids[:, :1], torch.full_like(p.ids[:, :1], -1), p.ids, p.ids[:, 2:3]], 1)
    padded = (ids, torch.cat([entry, entry, p.logits, p.logits[:, 2:3]], 1), p.lse)
    for listed in (p.targets, padded):
        leaf = logits.clone().requires_grad_()
        result = kk.sparse_kl(leaf, *listed, labels_N=p.labels, tail=tail, ce_weight=0.2, backend="triton")
        result.loss_sum.backward()
        results.append((result.loss_sum.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_sparse_kl_over_the_logits(make_example, device, inplace, dtype):
    """Existing logits: the gradient in place or in one copy; ignored rows and padding columns become zero."""
    p = put(make_example(rows=5, vocab=203).cast(torch.float32), device, grad=False)
    leaf = (p.hidden @ p.weight.T).to(dtype).requires_grad_()
    options = {"labels_N": p.labels, "ce_weight": 0.4, "vocab_size": 190}
    p = p._replace(ids=p.ids.clamp(max=189), labels=p.labels.clamp(max=189))
    options["labels_N"] = p.labels
    logits = leaf * 1.0
    result = kk.sparse_kl(logits, *p.targets, inplace_grad=inplace, backend="triton", **options)
    result.loss_sum.backward()
    wide = leaf.detach().double().cpu().requires_grad_()
    targets_cpu = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in p.targets]
    options["labels_N"] = p.labels.cpu()
    want = reference.sparse_kl(wide, *targets_cpu, **options)
    want.loss_sum.backward()
    torch.testing.assert_close(result.loss_sum.detach().double().cpu(), want.loss_sum.detach(), rtol=1e-4, atol=1e-4)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert near(leaf.grad, wide.grad, tolerance)
    assert not leaf.grad[3].any()
    assert not leaf.grad[:, 190:].any()
    assert torch.equal(logits, leaf) != inplace
    with torch.no_grad():
        before = logits.clone()
        kk.sparse_kl(logits, *p.targets, backend="triton", **{**options, "labels_N": p.labels})
        assert torch.equal(before, logits)  # without a gradient the logits are left alone


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_valid_gives_zero(make_example, device, rows):
    p = put(make_example(rows=rows).cast(torch.float32), device)
    labels = torch.full_like(p.labels, -100)
    result = kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=labels, backend="triton")
    result.loss_sum.backward()
    assert float(result.loss_sum.detach()) == 0.0
    assert not p.weight.grad.any()


def test_what_triton_cannot_do_is_refused_by_name(make_example, device):
    p = put(make_example(rows=4).cast(torch.float64), device)
    with pytest.raises(kk.BackendUnavailableError, match="fp64"):
        kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, backend="triton")
    assert kernels_backend.choose_backend("auto", device) == ("torch" if device == "cpu" else "triton")
    assert kernels_backend.choose_backend("auto", device, limit="fp64") == "torch"
