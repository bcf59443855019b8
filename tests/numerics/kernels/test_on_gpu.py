"""The ops on a GPU, a fake one: bf16 takes the products that CUDA has, values are a CPU's, and nothing waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdscale_kernels import DIVERGENCES, linear_full_kl, linear_sparse_kl, linear_topk_lse, sparse_kl
from tests.fake_gpu.cuda import fake_gpu

Op = Callable[..., Any]


def _sparse(mode: str) -> Op:
    def op(example: Any, **options: Any) -> Any:
        return linear_sparse_kl(
            example.hidden, example.weight, *example.targets, bias_V=example.bias, mode=mode, **options
        )

    return op


def _full(example: Any, **options: Any) -> Any:
    teacher = example.hidden.detach() * 0.5, example.weight.detach()
    return linear_full_kl(example.hidden, example.weight, *teacher, bias_V=example.bias, **options)


def _from_logits(example: Any, **options: Any) -> Any:
    logits_NV = example.hidden @ example.weight.T + example.bias
    return sparse_kl(logits_NV, *example.targets, **options)


# name: (op, where it waits): slices without Triton ask where the targets' ids lie
OPS: dict[str, tuple[Op, set[str]]] = {
    "row chunks": (_sparse("row_chunks"), set()),
    "vocabulary slices": (_sparse("vocab_slices"), {"tolist"}),
    "whole vocabulary": (_full, set()),
    "from logits": (_from_logits, set()),
}


def _loss_and_gradients(op: Op, example: Any, options: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    out = op(example, labels_N=example.labels, **options)
    out.loss_sum.backward()
    return out, [example.hidden.grad, example.weight.grad, example.bias.grad]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("divergence", "dtype"), [*((name, torch.float32) for name in DIVERGENCES), ("forward_kl", torch.bfloat16)]
)
def test_losses_and_gradients_without_a_wait(make_example, divergence, name, dtype):
    op, waits = OPS[name]
    given = make_example(noise=0.1, dtype=dtype)
    given = given._replace(labels=given.labels.clamp_min(0))
    options = {"ce_weight": 0.3, "divergence": divergence, "chunk_bytes": 4 * 203 * 4, "ignore_index": None}
    expected, gradients = _loss_and_gradients(op, given.cast(torch.float32), options)
    with fake_gpu() as syncs:
        example = given.cast(dtype)
        moved = [t.detach().to("cuda").requires_grad_(t.requires_grad) for t in example]
        syncs.clear()
        got, got_gradients = _loss_and_gradients(op, type(given)(*moved), options)
        assert {what for what, _ in syncs.seen} == waits, str(syncs)
        found = [tensor.cpu() for tensor in (got.loss_sum, *got_gradients)]
    near = 1e-5 if dtype == torch.float32 else 4e-2
    for ours, theirs in zip(found, [expected.loss_sum, *gradients], strict=True):
        assert (ours.float() - theirs).abs().max() <= near * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_logits_without_a_wait(make_example, dtype):
    """Equal values too: of these the lower ids come first, as on a CPU."""
    given = make_example(dtype=dtype, rows=9)
    weight_VH = given.weight.to(torch.float32).clone()
    weight_VH[100:] = weight_VH[:103].clone()  # every logit is there twice
    hidden_NH = given.hidden.to(dtype)
    expected = linear_topk_lse(hidden_NH, weight_VH.to(dtype), 7)
    with fake_gpu() as syncs:
        hidden, weight = hidden_NH.to("cuda"), weight_VH.to(dtype).to("cuda")
        syncs.clear()
        got = linear_topk_lse(hidden, weight, 7)
        assert syncs.total() == 0, str(syncs)
        ids, logits, lse = (tensor.cpu() for tensor in got)
    assert torch.equal(ids, expected.ids_NK)
    torch.testing.assert_close(logits, expected.logits_NK, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected.lse_N, rtol=1e-4, atol=1e-4)
