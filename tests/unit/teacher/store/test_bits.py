"""What is packed comes back, in as many bytes as was said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.errors import FileError
from kdscale.teacher.store.bits import id_sets_bytes, pack, pack_ids, packed_bytes, unpack, unpack_ids, width_of


@given(st.data(), st.integers(1, 24))
def test_values_come_back(data: st.DataObject, bits: int) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), np.int64)
    packed = pack(values, bits)
    assert packed.size == packed_bytes(values.size, bits)
    assert unpack(packed, values.size, bits).tolist() == values.tolist()


@given(st.data(), st.integers(1, 200_000))
def test_sets_of_ids_come_back(data: st.DataObject, vocab: int) -> None:
    """Of rows with different numbers of ids, also ids that repeat, as copies of the first entry do."""
    ids = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=70).map(sorted)
    rows = data.draw(st.lists(ids, max_size=5))
    sizes_N, ids_M = np.array([len(row) for row in rows], int), np.array([i for row in rows for i in row], int)
    packed = pack_ids(ids_M, sizes_N, vocab)
    assert packed.size == id_sets_bytes(vocab, ids_M.size, sizes_N.size)
    assert unpack_ids(packed, sizes_N, vocab).tolist() == ids_M.tolist()


def test_a_set_takes_less_than_its_ids() -> None:
    assert id_sets_bytes(49_152, 64_000, 1000) == 91_875  # 16 bits an id are 128 bytes a row
    assert id_sets_bytes(128_256, 64_000, 1000) == 103_625
    assert [width_of(largest) for largest in (0, 1, 2, 49_151, 65_536)] == [1, 1, 2, 16, 17]


@given(st.binary(min_size=30, max_size=30))
def test_other_bytes_are_ids_of_the_vocabulary_or_refused(data: bytes) -> None:
    sizes_N = np.array([5, 2, 8])
    try:
        ids_M = unpack_ids(np.frombuffer(data, np.uint8)[: id_sets_bytes(100, 15, 3)], sizes_N, 100)
    except FileError as error:
        assert "stored token ids" in error.what
    else:
        assert ids_M.min() >= 0 and ids_M.max() < 100


def test_too_few_ids_are_refused() -> None:
    with pytest.raises(FileError, match=r"expected: 15"):
        unpack_ids(np.zeros(id_sets_bytes(100, 15, 3), np.uint8), np.array([5, 5, 5]), 100)
