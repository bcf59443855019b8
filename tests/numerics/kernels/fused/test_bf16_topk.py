"""linear_topk_lse from bf16 logits on a CPU against the fp64 twin."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference
from kdscale_kernels.fused import bf16_topk
from kdscale_kernels.ops import linear_topk_lse as op

VOCAB = 16_421  # not a multiple of a group


@pytest.fixture(autouse=True)
def doubtful(on_bf16_cpu, monkeypatch):
    """The rows that were in doubt, chunk by chunk; no test goes without bf16 logits."""
    doubtful = []
    original = bf16_topk.bf16_topk_lse

    def spied(*args):
        top, rows_C = original(*args)
        doubtful.append(rows_C.clone())
        return top, rows_C

    monkeypatch.setattr(op, "bf16_topk_lse", spied)
    yield doubtful
    assert doubtful


def models(rows=24, hidden=32, vocab=VOCAB, spread=0.5):
    gen = torch.Generator().manual_seed(rows + hidden)
    hidden_NH = torch.randn(rows, hidden, generator=gen)
    return hidden_NH.bfloat16(), (spread * torch.randn(vocab, hidden, generator=gen)).bfloat16()


def check(got, hidden, weight, k, temperature=1.0, lse=1e-3):
    want = reference.linear_topk_lse(hidden.double(), weight.double(), k, temperature=temperature)
    truth = (hidden.double() @ weight.double().T).gather(1, got.ids_NK)
    torch.testing.assert_close(got.logits_NK.double(), truth, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(got.logits_NK.double(), want.logits_NK, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(got.lse_N.double(), want.lse_N, rtol=0.0, atol=lse)


@pytest.mark.parametrize("k", [1, 64, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equals_the_twin(doubtful, k, temperature):
    hidden, weight = models()
    got = kk.linear_topk_lse(hidden, weight, k, temperature=temperature, chunk_bytes=VOCAB * 2 * 10)
    check(got, hidden, weight, k, temperature)
    assert [len(rows) for rows in doubtful] == [8, 8, 8]
    assert int(torch.cat(doubtful).sum()) == 0  # or it tests the fallback


@pytest.mark.parametrize("spread", [0.02, 4.0])
def test_flat_and_peaked_rows(spread):
    """Logits within 1 nat of each other, and 90 nats apart."""
    hidden, weight = models(spread=spread)
    check(kk.linear_topk_lse(hidden, weight, 64), hidden, weight, 64)


def test_logits_far_above_what_the_sample_shows():
    """The shift is a guess from the first columns; the largest logits all lie beyond them."""
    hidden, weight = models()
    weight[9000:9200] = (weight[9000:9200] * 6).bfloat16()
    check(kk.linear_topk_lse(hidden, weight, 64), hidden, weight, 64)


def test_first_ids_far_below_the_rest_leave_no_doubt(doubtful):
    """Special tokens and bytes come first in many vocabularies: a shift guessed from them alone is 90 nats too low."""
    hidden, weight = models()
    hidden[:, 0], weight[:4096, 0] = 8.0, -12.0
    check(kk.linear_topk_lse(hidden, weight, 64), hidden, weight, 64)
    assert not torch.cat(doubtful).any()


def test_rows_in_doubt_are_made_again_in_fp32(doubtful):
    """Equal logits across the edge: the lower ids are kept, as from fp32 logits."""
    hidden, weight = models()
    weight[12_000:12_400] = weight[50]
    hidden[:8] = (weight[50] * 4).bfloat16()  # their 401 largest logits are the same one
    hidden[8] = 0.0
    got = kk.linear_topk_lse(hidden, weight, 64)
    assert torch.cat(doubtful)[:9].all()
    assert not torch.cat(doubtful).all()
    want = torch.tensor([50, *range(12_000, 12_063)])
    assert torch.equal(got.ids_NK[:8], want.expand(8, -1))
    assert torch.equal(got.ids_NK[8], torch.arange(64))
    check(got, hidden, weight, 64)


def test_near_equals_below_the_rounding_are_ordered_by_their_fp32_values(doubtful):
    """A thousand logits within a rounding of each other: without the doubt, entries would be missed."""
    hidden, weight = models(hidden=64)
    weight[4000:5000] = (
        weight[7] + 0.002 * torch.randn(1000, 64, generator=torch.Generator().manual_seed(3))
    ).bfloat16()
    hidden[:4] = (weight[7] * 6).bfloat16()
    got = kk.linear_topk_lse(hidden, weight, 64)
    assert torch.cat(doubtful)[:4].all()
    check(got, hidden, weight, 64)


def test_nan_stays_in_its_row(doubtful):
    hidden, weight = models()
    hidden[3, 5] = float("nan")
    got = kk.linear_topk_lse(hidden, weight, 8)
    assert got.lse_N.isnan().nonzero().flatten().tolist() == [3]
    weight[15_000, 0] = float("nan")
    assert kk.linear_topk_lse(hidden, weight, 8).lse_N.isnan().all()


def test_padding_and_fp32_operands_under_autocast():
    hidden, weight = models()
    weight[16_400:] = 100.0
    check(kk.linear_topk_lse(hidden, weight, 16, vocab_size=16_400), hidden, weight[:16_400], 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kk.linear_topk_lse(hidden.float(), weight.float(), 16, vocab_size=16_400)
    check(got, hidden, weight[:16_400], 16)


def test_no_rows():
    _, weight = models()
    assert kk.linear_topk_lse(weight[:0], weight, 8).ids_NK.shape == (0, 8)
    kk.linear_topk_lse(weight[:1], weight, 8)


def test_small_heads_and_those_with_a_bias_or_a_cap_keep_fp32_logits(doubtful):
    hidden, weight = models()
    kk.linear_topk_lse(hidden, weight[:8000], 8)
    kk.linear_topk_lse(hidden, weight, 3000)
    kk.linear_topk_lse(hidden, weight, 8, softcap=30.0)
    kk.linear_topk_lse(hidden, weight, 8, bias_V=torch.zeros(VOCAB))
    assert not doubtful
    kk.linear_topk_lse(hidden, weight, 8)
