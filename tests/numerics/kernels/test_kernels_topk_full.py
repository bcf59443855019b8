"""linear_topk_lse and linear_full_kl against their twins."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference
from kdscale_kernels.ops.linear_topk_lse import topk_rows


@pytest.mark.parametrize(("vocab", "k"), [(5, 9), (203, 1), (203, 203), (4099, 7), (8192, 16), (64, 64)])
@pytest.mark.parametrize("head", [{}, {"temperature": 3.0, "softcap": 4.0}])
def test_topk_lse(vocab, k, head):
    gen = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(9, 16, generator=gen), torch.randn(vocab, 16, generator=gen)
    bias = torch.randn(vocab, generator=gen)
    got = kk.linear_topk_lse(hidden, weight, k, bias_V=bias, chunk_bytes=vocab * 16, **head)
    want = reference.linear_topk_lse(hidden.double(), weight.double(), k, bias_V=bias.double(), **head)
    assert got.ids_NK.dtype == torch.int64
    assert got.logits_NK.dtype == got.lse_N.dtype == torch.float32
    torch.testing.assert_close(got.logits_NK.double(), want.logits_NK, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse_N.double(), want.lse_N, rtol=1e-6, atol=1e-5)
    assert torch.equal(got.ids_NK, want.ids_NK)


@pytest.mark.parametrize("vocab", [100, 6000, 6001])
def test_equal_logits_come_in_order_of_id(vocab):
    gen = torch.Generator().manual_seed(1)
    z = torch.randint(0, 400, (8, vocab), generator=gen).float()
    z[0] = 1.0
    z[1] = torch.where(torch.arange(vocab) % 2 == 0, 0.0, -0.0)
    ids, values = topk_rows(z.clone(), 20)
    want_values, want_ids = torch.sort(z, dim=1, descending=True, stable=True)
    assert torch.equal(ids, want_ids[:, :20])
    assert torch.equal(values, want_values[:, :20])


def test_nan_reaches_the_lse():
    hidden = torch.ones(2, 4)
    hidden[1, 2] = float("nan")
    result = kk.linear_topk_lse(hidden, torch.ones(300, 4), 3)
    assert result.lse_N.isnan().tolist() == [False, True]
    assert result.ids_NK[0].tolist() == [0, 1, 2]


def test_padded_head_is_sliced():
    weight = torch.cat([torch.randn(50, 4), torch.full((14, 4), 100.0)])
    result = kk.linear_topk_lse(torch.ones(3, 4), weight, 5, vocab_size=50)
    assert int(result.ids_NK.max()) < 50
    torch.testing.assert_close(result.lse_N, (torch.ones(3, 4) @ weight[:50].T).logsumexp(1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_full_kl(temperature, softcap):
    gen = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(13, 12, generator=gen), torch.randn(13, 20, generator=gen)
    sw, tw = torch.randn(130, 12, generator=gen), torch.randn(140, 20, generator=gen)
    sb, tb = torch.randn(130, generator=gen), torch.randn(140, generator=gen)
    tb[7] = -float("inf")  # an entry the teacher forbids
    labels = torch.randint(0, 7, (13,), generator=gen)
    valid = torch.arange(13) % 4 != 1
    labels[~valid] = -100
    options = {"temperature": temperature, "student_softcap": softcap, "vocab_size": 128}
    got = kk.linear_full_kl(
        student,
        sw,
        teacher,
        tw,
        valid_N=valid,
        labels_N=labels,
        student_bias_V=sb,
        teacher_bias_V=tb,
        chunk_bytes=4096,
        **options,
    )
    s64 = [t.double() for t in (student, sw, teacher, tw)]
    want = reference.linear_full_kl(
        *s64, valid_N=valid, labels_N=labels, student_bias_V=sb.double(), teacher_bias_V=tb.double(), **options
    )
    for field in ("loss_sum", "tokens", "top1_agree_sum", "ce_sum", "teacher_ce_sum"):
        torch.testing.assert_close(getattr(got, field).double(), getattr(want, field).double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="vocab_size"):
        kk.linear_full_kl(student, sw, teacher, tw, valid_N=valid)


def test_full_kl_of_nothing_and_of_itself():
    x, w = torch.randn(4, 6), torch.randn(90, 6)
    none = kk.linear_full_kl(x, w, x, w, valid_N=torch.zeros(4, dtype=torch.bool))
    assert (float(none.loss_sum), int(none.tokens)) == (0.0, 0)
    same = kk.linear_full_kl(x, w, x, w, valid_N=torch.ones(4, dtype=torch.bool))
    assert (float(same.loss_sum), float(same.top1_agree_sum)) == (0.0, 4.0)


def test_sparse_with_every_entry_equals_full():
    """K = V: the bucket loss is the exact KL."""
    x, w, y = torch.randn(5, 8), torch.randn(60, 8), torch.randn(5, 8)
    top = kk.linear_topk_lse(y, w, 60)
    sparse = kk.linear_sparse_kl(x, w, *top, labels_N=torch.zeros(5, dtype=torch.int64))
    full = kk.linear_full_kl(x, w, y, w, valid_N=torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(sparse.loss_sum, full.loss_sum, rtol=1e-5, atol=1e-5)
    assert float(sparse.student_tail_sum) == 0.0
