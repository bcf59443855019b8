"""The objective `attention` beside a twin in fp64 that is written out document by document and head by head."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kdscale.config.distill.layer_objectives import AttentionConfig
from kdscale.distill.objectives import attention, blockwise
from kdscale.distill.objectives.base import StudentOutput
from kdscale.models.attention import AttentionRows
from kdscale.models.attention_backends import AttentionKind
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets
from tests.numerics.distill.objectives.shapes import LargestTensor

# two packed sequences of 24 positions: their documents
LENGTHS = [[9, 1, 14], [24]]


def rows_of(seed, heads, groups, size, **kind):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(48, heads, size), (48, groups, size), (48, groups, size)]
    parts = (torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return AttentionRows(*parts, AttentionKind(size**-0.5, **kind))


def batch_of():
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    rows = torch.tensor([row for row in range(48) if row % 5])
    return MicroBatch(torch.zeros_like(positions), positions, rows, torch.zeros_like(rows))


def loss_of(own, teacher, compare, relation_heads=4):
    settings = AttentionConfig(layers={0: 1}, compare=compare, relation_heads=relation_heads)
    student = StudentOutput(torch.empty(0, 1), OutputHead(torch.empty(1, 1)), 1, attention={0: own})
    batch = batch_of()
    return attention.Attention(settings)(student, Targets(rows=batch.rows, attention={1: teacher}), batch)


def shares(query_QAD, key_KAD, kind, window):
    scores = torch.einsum("qad,kad->aqk", query_QAD, key_KAD) * kind.scale
    if kind.softcap:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    behind = torch.arange(len(query_QAD))[:, None] - torch.arange(len(key_KAD))
    hidden = behind.abs() >= window
    if kind.causal:
        hidden |= behind < 0
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def twin(own, teacher, compare, relation_heads=4):
    batch, total, begin = batch_of(), 0.0, 0
    counted = torch.zeros(48, dtype=torch.float64)
    counted[batch.rows_N] = 1.0
    for length in itertools.chain(*LENGTHS):
        at = slice(begin, begin + length)
        begin += length
        for what in compare:
            sides, window = [], length
            if what == "map":
                window = min([length, *(rows.kind.window for rows in (own, teacher) if rows.kind.window)])
            for rows in (own, teacher):
                if what == "map":
                    key = rows.key_TGD.repeat_interleave(rows.query_TAD.shape[1] // rows.key_TGD.shape[1], 1)
                    side = shares(rows.query_TAD[at], key[at], rows.kind, window)
                else:
                    vectors = {"query": rows.query_TAD, "key": rows.key_TGD, "value": rows.value_TGD}[what]
                    cut = vectors.flatten(1).unflatten(1, (relation_heads, -1))[at]
                    side = shares(cut, cut, AttentionKind(cut.shape[-1] ** -0.5, causal=rows.kind.causal), length)
                sides.append(side)
            if len(sides[0]) != len(sides[1]):
                sides = [side.mean(0, keepdim=True) for side in sides]
            q, p = sides
            kl = torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0.0)
            total = total + (kl.sum(-1) * counted[at]).sum() / len(p) / len(compare)
    return total


def gradients(loss, rows):
    return torch.autograd.grad(loss, [rows.query_TAD, rows.key_TGD, rows.value_TGD], allow_unused=True)


# heads, groups that share keys, size of a head; of student and of teacher
CASES = {
    "relations": (rows_of(1, 6, 2, 8), rows_of(2, 4, 2, 16), ("query", "key", "value")),
    "maps": (rows_of(1, 6, 2, 8), rows_of(2, 6, 3, 16), ("map",)),
    "capped maps in a window": (rows_of(1, 6, 2, 8, softcap=2.0, window=7), rows_of(2, 6, 6, 8, softcap=3.0), ("map",)),
    "relations both ways": (
        rows_of(1, 6, 6, 8, causal=False),
        rows_of(2, 4, 4, 16, causal=False),
        ("query", "key", "value"),
    ),
    "maps both ways in a window": (
        rows_of(1, 6, 6, 8, window=5, causal=False),
        rows_of(2, 6, 6, 8, causal=False),
        ("map",),
    ),
    "means of maps": (rows_of(1, 4, 2, 8), rows_of(2, 6, 2, 8), ("map", "query")),
}


@pytest.mark.parametrize("values", [1 << 20, 64])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_twin_in_any_blocks(name, values, monkeypatch):
    monkeypatch.setitem(blockwise._VALUES, "cpu", values)
    monkeypatch.setattr(attention, "_MOST_QUERIES", 7 if values == 64 else 256)
    own, teacher, compare = CASES[name]
    loss, terms = loss_of(own, teacher, compare)
    want = twin(own, teacher, compare)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms, want.detach().float().reshape(1))
    for got, expected in zip(gradients(3.0 * loss, own), gradients(3.0 * want, own), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_model_that_is_its_teacher_has_no_divergence_and_no_gradient():
    own = rows_of(1, 6, 2, 8)
    loss, _ = loss_of(own, own, ("query", "map"))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(gradients(loss, own)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("compare", ["query", "map"])
def test_no_array_has_all_pairs_of_all_heads(compare, monkeypatch):
    monkeypatch.setitem(blockwise._VALUES, "cpu", 512)
    monkeypatch.setattr(attention, "_MOST_QUERIES", 16)
    own, teacher = rows_of(1, 8, 4, 8), rows_of(2, 8, 4, 8)
    with LargestTensor() as largest:
        loss_of(own, teacher, (compare,), relation_heads=8)
    inputs = own.query_TAD.numel()
    assert largest.values <= max(inputs, 16 * 24 * 2) < 8 * 24 * 24
