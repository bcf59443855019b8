"""Every codec of the table: what is decoded, in how many bytes, and what other bytes are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.config.target_store import CODECS, CodecConfig, HiddenConfig, SampledConfig, TopKConfig
from kdscale.errors import FileError
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.store.codecs import make_codec
from kdscale.teacher.targets import SampledTargets, Targets, TopKTargets
from tests.unit.teacher.store.conftest import HIDDEN, VOCAB, targets_of

VARIANTS: list[CodecConfig] = [
    SampledConfig(draws=30, temperature=2.0),
    SampledConfig(draws=400),
    *(TopKConfig(top_k=16, bits=bits, temperature=2.0) for bits in (5, 6, 8, 16, 32)),
    TopKConfig(top_k=VOCAB, bits=32),
    *(HiddenConfig(dtype=dtype) for dtype in ("int8", "float8", "bfloat16", "float32")),
]


def _id(settings: CodecConfig) -> str:
    return "-".join(map(str, settings.model_dump().values()))


def test_every_codec_is_tested() -> None:
    assert {type(variant) for variant in VARIANTS} == set(CODECS.values())


def decoded(variant: CodecConfig, targets: Targets) -> dict[str, Any]:
    codec = make_codec(variant, VOCAB, HIDDEN)
    return codec.decode(codec.encode(targets), targets.rows)


@pytest.mark.parametrize("variant", VARIANTS, ids=_id)
@given(rows=st.integers(0, 9), seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_what_is_exact_comes_back_and_the_rest_within_its_bound(variant: CodecConfig, rows: int, seed: int) -> None:
    targets = targets_of(variant, rows, seed)
    found = decoded(variant, targets)
    assert all(len(array) == rows for array in found.values())
    if targets.sampled is not None:
        assert found["ids"].tolist() == targets.sampled.ids_NK.tolist()
        assert found["weights"].tolist() == targets.sampled.weights_NK.tolist()
    elif targets.top_k is not None:
        assert isinstance(variant, TopKConfig)
        _check_top_k(targets.top_k, found, variant.bits)
    else:
        assert targets.full is not None
        hidden_NH = targets.full.hidden_NG
        stored = torch.from_numpy(found["hidden"])
        dtype = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}
        values = stored.view(dtype.get(variant.dtype, torch.float32)).float() * torch.from_numpy(found["scale"])
        largest_N1 = hidden_NH.abs().amax(1, keepdim=True)
        bound = {
            "int8": largest_N1 / 254,
            "float8": hidden_NH.abs() / 16 + largest_N1 / 448 * 2.0**-9,
            "bfloat16": hidden_NH.abs() / 256,
            "float32": 0.0 * largest_N1,
        }[variant.dtype]
        assert bool(((values - hidden_NH).abs() <= bound * 1.001).all())


def _check_top_k(top: TopKTargets, found: dict[str, Any], bits: int) -> None:
    order_NK = top.ids_NK.argsort(1)
    assert found["ids"].tolist() == top.ids_NK.gather(1, order_NK).tolist()
    want, got = top.logits_NK.gather(1, order_NK), torch.from_numpy(found["logits"])
    if bits == 32:
        assert torch.equal(got, want) and torch.equal(torch.from_numpy(found["lse"]), top.lse_N)
        return
    if not len(want):
        return
    below_NK = want.amax(1, keepdim=True) - want
    most = 2**bits - 1
    reach_N1 = below_NK.amax(1, keepdim=True) * 1.001
    step = below_NK / 2048 if bits == 16 else (reach_N1 * below_NK).sqrt() / most + reach_N1 / most**2 / 4
    assert bool(((got + below_NK).abs() <= step * 1.01 + 1e-6).all())
    # the same mass, up to the error of the logits: the log-sum-exp moved with the largest logit
    moved = top.lse_N - want.amax(1) / top.temperature
    torch.testing.assert_close(torch.from_numpy(found["lse"]), moved)


def test_a_slot_without_a_token_is_empty_again() -> None:
    """An endpoint may give fewer tokens than were asked for."""
    minus, batch = float("-inf"), MicroBatch(*[torch.zeros(1, 1, dtype=torch.long)] * 4)
    top = TopKTargets(torch.tensor([[7, 9, 0]]), torch.tensor([[2.0, 1.0, minus]]), torch.zeros(1), 1.0, VOCAB)
    for entries in (3, 4):
        for bits in (6, 32):
            codec = make_codec(TopKConfig(top_k=entries, bits=bits), VOCAB, HIDDEN)
            arrays = codec.decode(codec.encode(Targets(rows=1, top_k=top)), 1)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            request: Any = None  # the codec needs nothing of it
            found = codec.assembler(request, VOCAB)(tensors, batch).top_k
            assert found is not None
            used_NK = found.logits_NK > minus
            assert found.ids_NK[used_NK].tolist() == [7, 9]
            torch.testing.assert_close((found.logits_NK - found.lse_N)[used_NK], torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("variant", VARIANTS, ids=_id)
def test_a_row_takes_about_as_many_bytes_as_the_disk_check_counts(variant: CodecConfig) -> None:
    """Samples only roughly: it depends on the teacher how many of them differ."""
    codec, targets = make_codec(variant, VOCAB, HIDDEN), targets_of(variant, 200, 1)
    share = codec.encode(targets).size / 200 / codec.row_bytes
    assert 0.2 < share < 2.0 if targets.sampled is not None else 0.99 < share < 1.01


@pytest.mark.parametrize("variant", VARIANTS, ids=_id)
@pytest.mark.parametrize("cut", [-1, 1, -10_000])
def test_a_block_of_another_size_is_refused(variant: CodecConfig, cut: int) -> None:
    codec = make_codec(variant, VOCAB, HIDDEN)
    packed = codec.encode(targets_of(variant, 6, 2))
    other = packed[:cut] if cut < 0 else np.append(packed, np.uint8(0))
    with pytest.raises(FileError, match=r"a block of stored targets|stored samples"):
        codec.decode(other, 6)


@given(data=st.binary(max_size=200), rows=st.integers(0, 5))
@settings(max_examples=40)
def test_any_bytes_are_targets_or_one_error(data: bytes, rows: int) -> None:
    for variant in (VARIANTS[0], VARIANTS[3], VARIANTS[8]):
        try:
            found = make_codec(variant, VOCAB, HIDDEN).decode(np.frombuffer(data, np.uint8), rows)
        except FileError:
            continue
        assert "ids" not in found or (found["ids"] < VOCAB).all()


def test_goals_of_the_codecs() -> None:
    """Bytes a row: sampled from a vocabulary of 49,152 with 12 different tokens, and the top 64 of it."""
    assert make_codec(TopKConfig(), 49_152, 576).row_bytes <= 150
    codec, entries = make_codec(SampledConfig(), 49_152, 576), 13
    ids_NK = torch.full((100, 51), -1)
    ids_NK[:, :entries] = torch.arange(100 * entries).reshape(100, entries)
    weights_NK = (ids_NK >= 0) / 50.0
    packed = codec.encode(Targets(rows=100, sampled=SampledTargets(ids_NK, weights_NK, 1.0, 49_152)))
    assert packed.size / 100 <= 40
