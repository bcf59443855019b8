"""Documents found in position ids."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from kdscale.models.documents import Documents

ROWS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@given(ROWS)
def test_documents_are_those_that_restart(lengths):
    documents = Documents.of(positions(lengths))
    assert documents.lengths == tuple(lengths)
    assert documents.bounds_D1.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert documents.bounds_D1.dtype == torch.int32
    assert documents.longest == max(lengths)
    assert [length for count, length in documents.runs() for _ in range(count)] == lengths


def test_a_row_ends_a_document_even_where_positions_go_on():
    assert Documents.of(torch.tensor([[4, 5, 6], [7, 8, 0]])).lengths == (3, 2, 1)


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=3))
def test_any_positions_are_cut_where_transformers_cuts_them(rows):
    position_BS = torch.tensor(rows)
    packed_BS = find_packed_sequence_indices(position_BS)
    document_BS = torch.zeros_like(position_BS) if packed_BS is None else packed_BS
    want = [int(count) for row in document_BS for count in row.unique_consecutive(return_counts=True)[1]]
    assert list(Documents.of(position_BS).lengths) == want


def test_what_layers_share_is_made_once():
    made, documents = [], Documents.of(positions([3]))
    assert [documents.once("key", lambda: made.append(1) or len(made)) for _ in range(2)] == [1, 1]
    assert documents.once("other", lambda: 5) == 5
