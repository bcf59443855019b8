"""Which positions and labels a rank has of a sequence, and what its attention may see."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdscale.data.batches import Batch
from kdscale.distill.parallel.checks import check_sequence_parallel
from kdscale.distill.parallel.mesh import Mesh
from kdscale.errors import ConfigError
from kdscale.models.sequence_parallel import Exchange

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 12)))
def test_a_query_sees_what_is_near_before_it_in_its_document(lengths, window):
    position_1S = positions(lengths)
    document_S = [i for i, n in enumerate(lengths) for _ in range(n)]
    length = len(document_S)
    want = torch.tensor([
        [k <= q and document_S[k] == document_S[q] and q - k < (window or length) for k in range(length)]
        for q in range(length)
    ])  # fmt: skip
    mask = Exchange(None, 1, position_1S).mask(window, torch.float32)
    seen = torch.ones(length, length).tril().bool() if mask is None else mask[0, 0] == 0.0
    assert torch.equal(seen, want)
    assert mask is None or torch.equal(mask[0, 0] == float("-inf"), ~want)


def test_one_document_needs_no_mask():
    exchange = Exchange(None, 1, positions([16]))
    assert exchange.mask(None, torch.float32) is exchange.mask(16, torch.float32) is None
    once = exchange.mask(4, torch.bfloat16)
    assert once is not None
    assert once is exchange.mask(4, torch.bfloat16)
    assert once.dtype == torch.bfloat16


@given(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 5))
def test_every_label_is_one_ranks(rows, parts, seed):
    gen = torch.Generator().manual_seed(seed)
    labels = torch.where(
        torch.rand(rows, 12, generator=gen) < 0.3, -100, torch.randint(0, 9, (rows, 12), generator=gen)
    )
    batch = Batch(labels.clone(), labels.clone(), labels, [])
    shares = [batch.part(number, parts) for number in range(parts)]
    assert sum(share.token_count for share in shares) == batch.token_count
    assert torch.equal(torch.stack([share.labels_BS for share in shares]).amax(0), labels)
    for number, share in enumerate(shares):
        columns = (share.labels_BS != -100).any(0).nonzero().flatten()
        assert all(number * 12 // parts <= int(c) < (number + 1) * 12 // parts for c in columns)
        assert torch.equal(share.input_ids_BS, batch.input_ids_BS)


def test_sums_of_micro_batches_add_up_over_a_sequence_and_count_once_over_a_layer():
    rows = [[1.0, 10.0], [1.0, 10.0], [2.0, 20.0], [2.0, 20.0], [3.0, 30.0], [3.0, 30.0], [4.0, 40.0], [4.0, 40.0]]
    assert Mesh(2, 2, 2, 0).by_data(rows) == [3.0, 30.0, 7.0, 70.0]


@pytest.mark.parametrize(
    ("ranks", "seq_len", "heads", "kv_heads", "told"),
    [
        (3, 64, 6, 3, r"divisor of distill\.seq_len \(64\)"),
        (4, 64, 6, 2, "divisor of the teacher's 6 query heads"),
        (4, 64, 12, 3, "divisor or a multiple of the teacher's 3 kv heads"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, ranks, seq_len, heads, kv_heads, told):
    config = {
        "model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=told):
        check_sequence_parallel(ranks, seq_len, {"teacher": tmp_path})
    check_sequence_parallel(1, seq_len, {"teacher": tmp_path})


def test_a_soft_capped_attention_is_refused_before_a_weight_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2", "attn_logit_softcapping": 50.0}))
    with pytest.raises(ConfigError, match="no soft-cap"):
        check_sequence_parallel(2, 64, {"teacher": tmp_path})
