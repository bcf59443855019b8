"""What is packed comes back, in as many bytes as was said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.errors import FileError
from kdscale.teacher.store.bits import id_set_bytes, pack, pack_ids, packed_bytes, unpack, unpack_ids, width_of


@given(st.data(), st.integers(1, 24))
def test_values_come_back(data: st.DataObject, bits: int) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), np.int64)
    packed = pack(values, bits)
    assert packed.size == packed_bytes(values.size, bits)
    assert unpack(packed, values.size, bits).tolist() == values.tolist()


@given(st.data(), st.integers(1, 200_000))
def test_sets_of_ids_come_back(data: st.DataObject, vocab: int) -> None:
    """Also with ids that repeat, as copies of the first entry do."""
    entries = data.draw(st.integers(1, min(vocab, 70)))
    row = st.lists(st.integers(0, vocab - 1), min_size=entries, max_size=entries).map(sorted)
    ids_NK = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    packed = pack_ids(ids_NK, vocab)
    assert packed.size == id_set_bytes(len(ids_NK), vocab, entries)
    assert unpack_ids(packed, len(ids_NK), vocab, entries).tolist() == ids_NK.tolist()


def test_a_set_takes_less_than_its_ids() -> None:
    assert id_set_bytes(1000, 49_152, 64) == 92_000  # 16 bits an id are 128 bytes a row
    assert id_set_bytes(1000, 128_256, 64) == 104_000
    assert [width_of(largest) for largest in (0, 1, 2, 49_151, 65_536)] == [1, 1, 2, 16, 17]


@given(st.binary(min_size=30, max_size=30))
def test_other_bytes_are_ids_of_the_vocabulary_or_refused(data: bytes) -> None:
    size = id_set_bytes(3, 100, 5)
    try:
        ids_NK = unpack_ids(np.frombuffer(data, np.uint8)[:size], 3, 100, 5)
    except FileError as error:
        assert "stored token ids" in error.what
    else:
        assert ids_NK.min() >= 0 and ids_NK.max() < 100


def test_too_few_ids_are_refused() -> None:
    with pytest.raises(FileError, match=r"expected: 5 a row"):
        unpack_ids(np.zeros(id_set_bytes(3, 100, 5), np.uint8), 3, 100, 5)
