"""Tokens drawn from a teacher: the same wherever they are drawn, and right on average."""

from __future__ import annotations

import torch

from kdscale.models.head import OutputHead
from kdscale.teacher.sampling import EMPTY, draw, uniforms_of
from kdscale.teacher.targets import SampledTargets, Targets
from kdscale_kernels import linear_sparse_kl

T, VOCAB, DRAWS, TRIES = 2.0, 40, 12, 400


def drawn(hidden_NH: torch.Tensor, head: OutputHead, sequence: int, rows: list[int] | None = None) -> SampledTargets:
    rows_N = torch.arange(len(hidden_NH)) if rows is None else torch.tensor(rows)
    uniforms_ND = uniforms_of([("train", sequence)], 8, rows_N, DRAWS, seed=7)
    return draw(hidden_NH, head, uniforms_ND, temperature=T, vocab_size=VOCAB)


def models() -> tuple[torch.Tensor, OutputHead]:
    gen = torch.Generator().manual_seed(0)
    return torch.randn(6, 8, generator=gen), OutputHead(torch.randn(VOCAB + 3, 8, generator=gen))


def test_a_row_has_its_most_likely_token_first_and_weights_of_one() -> None:
    hidden_NH, head = models()
    sampled = drawn(hidden_NH, head, 0)
    assert sampled.ids_NK.shape == (6, DRAWS + 1)
    assert sampled.ids_NK[:, 0].tolist() == head.logits(hidden_NH)[:, :VOCAB].argmax(1).tolist()
    for ids, weights in zip(sampled.ids_NK.tolist(), sampled.weights_NK.tolist(), strict=True):
        used = [token for token in ids if token != EMPTY]
        assert len(set(used)) == len(used) and max(used) < VOCAB
        assert all(weight == 0.0 for token, weight in zip(ids, weights, strict=True) if token == EMPTY)
    torch.testing.assert_close(sampled.weights_NK.sum(1), torch.ones(6))
    assert float(Targets(rows=6, sampled=sampled).probe()) == float(sampled.weights_NK.sum())


def test_draws_depend_on_the_sequence_and_the_position_alone() -> None:
    hidden_NH, head = models()
    whole, part = drawn(hidden_NH, head, 3), drawn(hidden_NH[[1, 4]], head, 3, rows=[1, 4])
    assert torch.equal(part.ids_NK, whole.ids_NK[[1, 4]]) and torch.equal(part.weights_NK, whole.weights_NK[[1, 4]])
    assert not torch.equal(drawn(hidden_NH, head, 4).ids_NK, whole.ids_NK)
    two = uniforms_of([("train", 4), ("heldout", 3)], 8, torch.tensor([9, 1]), DRAWS, seed=7)
    assert torch.equal(two[1], uniforms_of([("train", 4)], 8, torch.tensor([1]), DRAWS, seed=7)[0])
    assert not torch.equal(two[0], two[1])


def test_the_gradient_is_that_of_the_whole_vocabulary_on_average() -> None:
    """fp64; the mean over R tries is off by no more than its own standard deviation allows."""
    gen = torch.Generator().manual_seed(1)
    hidden_NH, student_NH, weight_VH = (torch.randn(n, 8, generator=gen).double() for n in (6, 6, VOCAB))
    labels_N = torch.zeros(6, dtype=torch.long)

    # all tries in one call: 400 calls of the kernel take a minute
    sampled = [drawn(hidden_NH, OutputHead(weight_VH), n) for n in range(TRIES)]
    student = student_NH.repeat(TRIES, 1).requires_grad_()
    out = linear_sparse_kl(
        student, weight_VH, torch.cat([s.ids_NK for s in sampled]), torch.cat([s.marks() for s in sampled]),
        torch.zeros(len(student)), labels_N=labels_N.repeat(TRIES), temperature=T, tail="sampled",
        target_weights_NK=torch.cat([s.weights_NK for s in sampled]),
    )  # fmt: skip
    out.loss_sum.backward()
    assert student.grad is not None
    tries = student.grad.view(TRIES, *student_NH.shape)
    p_NV, q_NV = (torch.softmax(h @ weight_VH.T / T, 1) for h in (hidden_NH, student_NH))
    exact = T * (q_NV - p_NV) @ weight_VH
    deviation = tries.std(0) / len(tries) ** 0.5
    z = (tries.mean(0) - exact) / deviation
    assert float(z.abs().max()) < 4.0  # of 48 numbers
    assert 0.7 < float(z.square().mean()) < 1.4
