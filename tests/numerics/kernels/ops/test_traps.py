"""What goes wrong in such losses: lost tails, infinities, NaN, odd shapes, padded vocabularies, bad arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdscale_kernels as kk
from kdscale_kernels import DIVERGENCES, reference

INF = float("inf")


def run(logits, ids, teacher, lse, labels, **options):
    logits = logits.clone().requires_grad_()
    result = kk.sparse_kl(logits, ids, teacher, lse, labels_N=labels, **options)
    result.loss_sum.backward()
    return result, logits.grad


def single(student, teacher, k):
    """One row of logits each; the teacher's top k and its log-sum-exp, computed in fp64."""
    student, teacher = torch.tensor([student]), torch.tensor([teacher], dtype=torch.float64)
    values, ids = teacher.topk(k, 1)
    return student, ids, values.float(), teacher.logsumexp(1).float(), torch.tensor([0])


def test_tiny_student_tail_is_not_one_minus_the_rest():
    """Student tail 1e-9 is invisible to 1 - sum in fp32; the loss and its gradient must still see it."""
    row = single([10.0, 9.0, -12.0, -13.0], [2.0, 1.0, 0.0, -1.0], 2)
    result, grad = run(*row)
    wide = row[0].double().requires_grad_()
    want = reference.sparse_kl(wide, *[t.double() if t.is_floating_point() else t for t in row[1:4]], labels_N=row[4])
    want.loss_sum.backward()
    torch.testing.assert_close(result.loss_sum.double(), want.loss_sum, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), wide.grad, rtol=1e-5, atol=1e-9)


def test_student_tail_that_underflows_still_pulls():
    """q_tail = e^-200 is 0 in fp32: the loss is finite and the tail's gradient tends to -p_tail, not 0 and not NaN."""
    row = single([100.0, 99.0, -100.0, -100.0], [2.0, 1.0, 0.5, 0.5], 2)
    result, grad = run(*row)
    wide = [t.double() if t.is_floating_point() else t for t in row]
    want = reference.sparse_kl(*wide[:4], labels_N=row[4])  # e^-200 is an ordinary number in fp64
    torch.testing.assert_close(result.loss_sum.detach().double(), want.loss_sum, rtol=1e-5, atol=0)
    p_tail = float(torch.softmax(torch.tensor([2.0, 1.0, 0.5, 0.5], dtype=torch.float64), 0)[2:].sum())
    torch.testing.assert_close(grad[0, 2:], torch.full((2,), -p_tail / 2), rtol=1e-5, atol=0)


def test_teacher_tail_zero_adds_nothing():
    result, grad = run(*single([1.0, 0.5, 0.0], [200.0, 199.0, -200.0], 2))
    assert result.loss_sum.isfinite()
    assert grad.isfinite().all()
    result, grad = run(*single([1.0, 0.5, 0.0], [200.0, 199.0, -200.0], 2), divergence="reverse_kl")
    assert result.loss_sum.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "truncated", "renormalised"])
def test_empty_and_repeated_slots_change_nothing(make_example, divergence, tail):
    """Slots of -inf (with any id, even out of range) and repeats of an entry leave loss and gradient as they were."""
    p = make_example().cast(torch.float32)
    logits = (p.hidden @ p.weight.T).detach()
    options = {"divergence": divergence, "tail": tail, "ce_weight": 0.2}
    plain, plain_grad = run(logits, *p.targets, p.labels, **options)
    ids = torch.cat([p.ids[:, :1], torch.full((11, 1), -1), p.ids, p.ids[:, 2:3]], 1)
    entry = torch.full((11, 1), -INF)
    teacher = torch.cat([entry, entry, p.logits, p.logits[:, 2:3]], 1)
    padded, padded_grad = run(logits, ids, teacher, p.lse, p.labels, **options)
    torch.testing.assert_close(padded.loss_sum, plain.loss_sum)
    torch.testing.assert_close(padded_grad, plain_grad)


@pytest.mark.parametrize("tail", ["bucket", "truncated", "renormalised"])
@pytest.mark.parametrize("in_support", [True, False])
def test_nan_logit_poisons_its_row(make_example, tail, in_support):
    p = make_example().cast(torch.float32)
    logits = (p.hidden @ p.weight.T).detach()
    column = int(p.ids[5, 2]) if in_support else int((set(range(203)) - set(p.ids[5].tolist())).pop())
    logits[5, column] = float("nan")
    result, grad = run(logits, *p.targets, p.labels, tail=tail)
    assert result.loss_sum.isnan()
    assert grad[5].isnan().any()
    assert grad[[0, 1, 2, 4, 6]].isfinite().all()


@pytest.mark.parametrize("broken", [float("nan"), -INF])
def test_teacher_row_without_numbers_is_a_readable_error(make_example, broken):
    p = make_example().cast(torch.float32)
    p.logits[4] = broken
    with pytest.raises(ValueError, match=r"teacher targets.*valid row 3"):
        kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels)
    p.labels[4] = -100  # an ignored row may hold anything
    assert kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels).loss_sum.isfinite()


def test_minus_infinity_in_the_students_tail():
    student = [1.0, 0.5, -INF, 0.25]
    result, grad = run(*single(student, [2.0, 1.0, 0.0, -1.0], 2))
    assert result.loss_sum.isfinite()
    assert grad.isfinite().all()
    assert float(grad[0, 2]) == 0.0


@pytest.mark.parametrize(("rows", "vocab", "k"), [(1, 2, 1), (5, 41, 3), (7, 401, 33), (4, 64, 64), (3, 1271, 5)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_awkward_shapes(make_example, rows, vocab, k, divergence):
    p32 = make_example(rows=rows, hidden=8, vocab=vocab, k=k, spread=0.5).cast(torch.float32)
    p64 = p32.cast(torch.float64)
    for chunk_bytes in (1, 1 << 20):
        got = kk.linear_sparse_kl(
            p32.hidden, p32.weight, *p32.targets, labels_N=p32.labels, divergence=divergence, chunk_bytes=chunk_bytes
        )
        want = reference.linear_sparse_kl(
            p64.hidden, p64.weight, *p64.targets, labels_N=p64.labels, divergence=divergence
        )
        torch.testing.assert_close(got.loss_sum.double(), want.loss_sum, rtol=1e-4, atol=1e-5)
        p32.hidden.grad = p64.hidden.grad = None
        got.loss_sum.backward()
        want.loss_sum.backward()
        torch.testing.assert_close(p32.hidden.grad.double(), p64.hidden.grad, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_valid_gives_zero_and_zero_gradients(make_example, rows):
    p = make_example(rows=rows).cast(torch.float32)
    p.labels[:] = -100
    result = kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, ce_weight=0.5)
    result.loss_sum.backward()
    assert float(result.loss_sum) == 0.0
    assert int(result.tokens) == 0
    assert p.weight.grad.shape == p.weight.shape
    assert not p.weight.grad.any()
    assert not p.hidden.grad.any()


def test_padded_vocabulary_rows_take_no_part(make_example):
    p = make_example(vocab=190).cast(torch.float32)
    padded = torch.cat([p.weight.detach(), torch.full((13, 24), 1e4)]).requires_grad_()
    plain = kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, ce_weight=0.5)
    sliced = kk.linear_sparse_kl(p.hidden, padded, *p.targets, labels_N=p.labels, ce_weight=0.5, vocab_size=190)
    sliced.loss_sum.backward()
    torch.testing.assert_close(plain.loss_sum, sliced.loss_sum)
    assert not padded.grad[190:].any()
    with pytest.raises(ValueError, match="ids from 0 to 99"):
        kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, vocab_size=100)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ce_weight": 1.5}, "ce_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"divergence": "kl"}, "divergence"),
        ({"tail": "cut"}, "tail"),
        ({"tail": "sampled"}, "target_weights_NK: expected with"),
        ({"target_weights_NK": torch.ones(11, 7)}, "target_weights_NK: expected with"),
        ({"tail": "sampled", "target_weights_NK": torch.ones(11, 6)}, "target_weights_NK: expected a floating"),
        ({"tail": "sampled", "target_weights_NK": torch.zeros(11, 7)}, "not all 0, got valid row 0"),
        ({"tail": "sampled", "target_weights_NK": torch.full((11, 7), -0.1)}, "weights of 0 or more"),
        ({"tail": "sampled", "target_weights_NK": torch.full((11, 7), INF)}, "finite weights"),
        ({"tail": "sampled", "target_weights_NK": torch.ones(11, 7), "divergence": "jsd"}, "forward_kl with tail"),
        ({"softcap": -1.0}, "softcap"),
        ({"vocab_size": 204}, "vocab_size"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"backend": "cuda"}, "backend"),
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, "labels_N"),
        ({"labels_N": torch.full((11,), 999)}, "labels_N"),
        ({"bias_V": torch.zeros(3)}, "bias_V"),
    ],
)
def test_bad_arguments_are_named(make_example, change, match):
    p = make_example().cast(torch.float32)
    with pytest.raises(ValueError, match=match):
        kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, **{"labels_N": p.labels, **change})


def test_triton_is_refused_and_the_choice_logged_once(make_example, caplog, monkeypatch):
    monkeypatch.setattr("kdscale_kernels.backend._logged", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = make_example().cast(torch.float32)
    with pytest.raises(
        kk.BackendUnavailableError, match=r"backend='triton': (triton is not installed|.*TRITON_INTERPRET)"
    ):
        kk.linear_topk_lse(p.hidden, p.weight, 3, backend="triton")
    with caplog.at_level("INFO", logger="kdscale_kernels"):
        for _ in range(3):
            kk.linear_topk_lse(p.hidden, p.weight, 3)
    assert len(caplog.records) == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    divergence=st.sampled_from(list(DIVERGENCES)),
    tail=st.sampled_from(["bucket", "renormalised"]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
)
def test_divergence_is_not_negative_and_zero_at_equality(seed, k, temperature, divergence, tail, spread):
    gen = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(6, 40, generator=gen) * spread for _ in range(2))
    values, ids = teacher.topk(k, 1)
    lse = (teacher.double() / temperature).logsumexp(1).float()
    labels = torch.zeros(6, dtype=torch.int64)
    options = {"temperature": temperature, "divergence": divergence, "tail": tail}
    apart, _ = run(student, ids, values, lse, labels, **options)
    same, grad = run(teacher, ids, values, lse, labels, **options)
    assert float(apart.kd_sum) >= -1e-5
    assert abs(float(same.kd_sum)) <= 3e-5
    assert float(grad.abs().max()) <= 1e-5 * max(1.0, temperature)
