"""Every backend against attention with a dense mask in fp64: documents, windows, soft caps, shared heads, gradients.

T positions, A query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from kdscale.models import attention_backends as backends
from kdscale.models.attention_backends import BACKENDS, AttentionKind, choose
from kdscale.models.documents import Documents

CPU = torch.device("cpu")
BY_NAME = {backend.name: backend for backend in BACKENDS}
ROWS = {
    "documents of one token": [[1, 1, 5, 1]],
    "one document a row": [[24], [24], [24]],
    "padding at the end": [[17, 3, 1, 1, 1, 1], [20, 4]],
    "beyond every block": [[70, 30, 24]],
}
KINDS = {
    "plain": AttentionKind(0.3),
    "window of 1": AttentionKind(0.3, window=1),
    "window": AttentionKind(0.3, window=7),
    "wide window": AttentionKind(0.3, window=60),
    "soft cap": AttentionKind(0.3, softcap=2.0),
    "soft cap and window": AttentionKind(0.3, window=15, softcap=2.0),
    "both ways": AttentionKind(0.3, causal=False),
    "both ways in a window": AttentionKind(0.3, window=7, causal=False),
    "both ways, capped": AttentionKind(0.3, window=20, softcap=2.0, causal=False),
}
HEADS, GROUPS, SIZE = 6, 2, 16


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that documents are cut into several blocks of queries."""
    monkeypatch.setattr(backends, "_MOST_QUERIES", 16)
    monkeypatch.setattr(backends, "_FEWEST_QUERIES", 4)


def positions(rows):
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def inputs(rows, dtype=torch.float64, device=CPU):
    total, gen = sum(map(sum, rows)), torch.Generator().manual_seed(3)
    made = [torch.randn(total, heads, SIZE, generator=gen, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS)]
    return [x.to(device, dtype).requires_grad_() for x in made]


def dense(query, key, value, lengths, kind):
    """Straight from the definition, over all T × T pairs."""
    total, document_T = len(query), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    behind_TT = torch.arange(total)[:, None] - torch.arange(total)
    seen_TT = (document_T[:, None] == document_T) & (behind_TT.abs() < (kind.window or total))
    if kind.causal:
        seen_TT &= behind_TT >= 0
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    scores = torch.einsum("qad,kad->aqk", query, key) * kind.scale
    if kind.softcap:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    shares = scores.masked_fill(~seen_TT.to(scores.device), float("-inf")).softmax(-1)
    return torch.einsum("aqk,kad->qad", shares, value)


def output_and_gradients(attend, tensors):
    out = attend(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def check(backend, rows, kind, dtype=torch.float64, device=CPU, tolerance=1e-10):
    documents = Documents.of(positions(rows)).to(device)
    got = output_and_gradients(lambda *qkv: backend.attend(*qkv, documents, kind), inputs(rows, dtype, device))
    want = output_and_gradients(lambda *qkv: dense(*qkv, documents.lengths, kind), inputs(rows))
    for one, other in zip(got, want, strict=True):
        largest = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double().cpu(), other, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_torchs_attention_document_by_document(rows, kind):
    check(BY_NAME["sdpa"], ROWS[rows], KINDS[kind])


def as_published(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window, softcap=0.0):
    """What FlashAttention's variable-length functions do, by their own descriptions."""
    lengths = tuple(cu_q.diff().tolist())
    assert cu_q.dtype == torch.int32
    assert cu_q is cu_k
    assert max_q == max_k == max(lengths)
    before, after = window
    assert after in (0, before)
    kind = AttentionKind(scale, None if before == -1 else before + 1, softcap or None, causal=after == 0 != before)
    return dense(query, key, value, lengths, kind)


@pytest.mark.parametrize(
    "kind", ["plain", "window of 1", "window", "wide window", "both ways", "both ways in a window"]
)
@pytest.mark.parametrize("rows", ROWS)
def test_torchs_variable_length_function_is_asked_for_the_same(rows, kind, monkeypatch):
    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        return as_published(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window=window_size)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    check(BY_NAME["torch varlen"], ROWS[rows], KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_flash_attn_is_asked_for_the_same(rows, kind, monkeypatch):
    def function(
        q, k, v, cu_q, cu_k, max_q, max_k, *, dropout_p, softmax_scale, causal, window_size, softcap
    ):  # fmt: skip
        assert causal == KINDS[kind].causal
        assert dropout_p == 0.0
        return as_published(q, k, v, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window=window_size, softcap=softcap)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=function))
    check(BY_NAME["flash-attn"], ROWS[rows], KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["padding at the end"])
def test_flex_attention_is_given_the_same_mask_and_cap(rows, kind, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(backends, "_compiled_flex", lambda: flex_attention)  # its plain form, which knows no backward
    documents = Documents.of(positions(ROWS[rows]))
    query, key, value = (x.detach() for x in inputs(ROWS[rows]))
    got = BY_NAME["flex"].attend(query, key, value, documents, KINDS[kind])
    torch.testing.assert_close(got, dense(query, key, value, documents.lengths, KINDS[kind]), atol=1e-10, rtol=0)


def test_what_this_torch_has_fits_how_it_is_called():
    """The signature is checked here, where no GPU is."""
    lacks = BY_NAME["torch varlen"].lacks
    assert lacks(CPU, torch.bfloat16, 64, KINDS["plain"]) == "needs a GPU"
    assert "soft cap" in lacks(CPU, torch.bfloat16, 64, KINDS["soft cap"])


def test_an_attention_that_fails_or_cannot_is_passed_over_and_named(monkeypatch):
    lacking = {"a": "", "b": "is not installed", "c": "", "d": ""}
    made = [backends.Backend(name, lambda *_, why=why: why, None) for name, why in lacking.items()]
    seen = []

    def trial(backend, *_):
        seen.append(backend.name)
        return "RuntimeError: no kernel" if backend.name == "a" else ""

    monkeypatch.setattr(backends, "BACKENDS", tuple(made))
    monkeypatch.setattr(backends, "_trial", trial)
    choice = choose.__wrapped__(torch.device("cuda"), torch.bfloat16, 64, None, False)
    assert choice.backend.name == "c"
    assert seen == ["a", "c"]
    assert choice.in_words() == (
        "attention within documents by c (not a: RuntimeError: no kernel; not b: is not installed)"
    )


def test_a_cpu_takes_torchs_attention():
    choice = choose(CPU, torch.float32, 64, 30.0, True)
    assert choice.in_words() == "attention within documents by sdpa"


def test_keys_and_values_are_not_repeated_to_all_heads():
    """Nothing that is kept for the backward has them so, nor a mask."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        BY_NAME["sdpa"].attend(*inputs([[24, 40]]), Documents.of(positions([[24, 40]])), KINDS["plain"])
    heads = sorted(x.shape[1] for x in kept if x.ndim == 4)
    assert heads == sorted(2 * [HEADS, HEADS, GROUPS, GROUPS])  # query, output, key and value of two documents


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["padding at the end", "beyond every block"])
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(gpu, name, dtype, rows, kind):
    if reason := BY_NAME[name].lacks(gpu, dtype, SIZE, KINDS[kind]):
        pytest.skip(reason)
    check(BY_NAME[name], ROWS[rows], KINDS[kind], dtype, gpu, tolerance=3e-2 if dtype == torch.bfloat16 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_gpu_of_today_finds_a_kernel_in_16_bits(gpu, softcap):
    assert choose(gpu, torch.bfloat16, 64, softcap, False).backend.name != "sdpa"
