"""What the attention of ranks that share sequences may see."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

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
