"""What the vocab-parallel tests compare: the shards' results put together, and the fp64 twin on the whole head."""

from __future__ import annotations

import torch

from kdscale_kernels import reference


def whole_gradients(case, results):
    """Each rank's (equal) gradient of the hidden states, and the shards' put together; checks they are equal."""
    hidden = [r["grads"][0] for r in results]
    assert all(torch.equal(hidden[0], other) or hidden[0].isnan().any() for other in hidden[1:])
    parts = sorted(zip(case["spans"], results, strict=True), key=lambda pair: pair[0])
    weight = torch.cat([r["grads"][1] for _, r in parts])
    bias = torch.cat([r["grads"][2] for _, r in parts]) if case["bias"] is not None else None
    return hidden[0], weight, bias


def truth(case):
    """The fp64 twin's (sums, gradients of hidden, the whole weight, the whole bias)."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_() for t in map(case.get, ("hidden", "weight", "bias"))
    ]
    spans = sorted(case["spans"])
    shards = [leaves[1][a:b] for a, b in spans]
    biases = None if leaves[2] is None else [leaves[2][a:b] for a, b in spans]
    targets = [t.double() if t.is_floating_point() else t for t in case["targets"]]
    sums = reference.vocab_parallel_sparse_kl(
        leaves[0],
        shards,
        *targets,
        vocab_size=case["vocab_size"],
        bias_shards=biases,
        labels_N=case["labels"],
        **case["options"],
    )
    (sums.loss_sum * 0.37).backward()
    return sums, [None if t is None else t.grad for t in leaves]


def same_on_all(results):
    first = results[0]["sums"]
    return all(torch.equal(first[key], r["sums"][key]) for r in results for key in first)


def check_against_truth(ran, name, tol):
    case, results = ran[name]
    want, want_grads = truth(case)
    assert same_on_all(results)
    for field, got in results[0]["sums"].items():
        torch.testing.assert_close(got.double(), getattr(want, field).detach().double(), rtol=tol, atol=tol)
    for actual, expected in zip(whole_gradients(case, results), want_grads, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual.double(), expected, rtol=tol, atol=tol)
