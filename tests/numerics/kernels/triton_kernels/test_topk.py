"""The Triton top-k against a stable sort and the fp64 twin: in Triton's interpreter on a CPU, and the same on a GPU."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference
from kdscale_kernels.types import LossOptions

INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.mark.parametrize(("vocab", "k"), [(700, 5), (640, 9), (130, 130), (41, 3), (65, 2), (1, 1), (700, 1)])
@pytest.mark.parametrize("step", [None, 0.5, 5.0])
def test_topk_is_exact_with_lower_ids_first(device, vocab, k, step):
    """step rounds the logits to a grid, so that ties fall inside, between and across groups."""
    from kdscale_kernels.triton_kernels.topk import topk_step

    z = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    z = z if step is None else (z / step).round() * step + 0.0 * z
    if vocab > 1:
        z[1, vocab // 2] = -INF
        z[2, ::2] *= 0.0  # of both signs, which are equal
    ids, values, lse = topk_step(z.to(device).clone(), k, LossOptions(temperature=1.5))
    want, order = torch.sort(z, dim=1, descending=True, stable=True)
    assert torch.equal(ids.cpu(), order[:, :k])
    assert torch.equal(values.cpu(), want[:, :k])
    torch.testing.assert_close(lse.double().cpu(), (z.double() / 1.5).logsumexp(1), rtol=1e-6, atol=1e-6)


def test_topk_of_nan_rows_and_none(device):
    from kdscale_kernels.triton_kernels.topk import topk_step

    z = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    z[1, 77] = NAN
    ids, values, lse = topk_step(z.to(device), 4, LossOptions())
    assert lse[1].isnan()
    assert int(ids[1, 0]) == 77
    assert values[1, 0].isnan()
    assert lse[[0, 2]].isfinite().all()
    ids, values, lse = topk_step(z[:0].to(device), 4, LossOptions())
    assert (ids.shape, values.shape, lse.shape) == ((0, 4), (0, 4), (0,))


@pytest.mark.parametrize("head", [{}, {"temperature": 2.0, "softcap": 3.0, "with_bias": True, "vocab_size": 190}])
def test_linear_topk_lse_equals_its_twin(make_example, device, head):
    head = dict(head)
    p = make_example(rows=7, noise=0.3, **head).cast(torch.float32, grad=False)
    bias = p.bias if head.pop("with_bias", False) else None
    want = reference.linear_topk_lse(
        p.hidden.double(), p.weight.double(), 9, bias_V=None if bias is None else bias.double(), **head
    )
    q = p._replace(hidden=p.hidden.to(device), weight=p.weight.to(device), bias=p.bias.to(device))
    results = [
        kk.linear_topk_lse(
            q.hidden, q.weight, 9, bias_V=None if bias is None else q.bias, backend="triton", chunk_bytes=4000, **head
        )
        for _ in range(2)
    ]
    assert torch.equal(results[0].ids_NK.cpu(), want.ids_NK)
    torch.testing.assert_close(results[0].logits_NK.double().cpu(), want.logits_NK, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0].lse_N.double().cpu(), want.lse_N, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
