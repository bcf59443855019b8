"""linear_topk_lse against its twin."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference
from kdscale_kernels.rows.torch_topk import topk_rows


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
