"""Megatron's indexed data sets: written and read again, bytes as Megatron lays them out, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.config.data import SourceConfig
from kdscale.data.readers import megatron
from kdscale.data.sources import describe_source, read_documents
from kdscale.errors import DataError


def documents(prefix: Path) -> list[list[int]]:
    return [document.ids.tolist() for document in read_documents(SourceConfig(path=f"{prefix}.idx"))]


def test_what_is_written_is_read(tmp_path: Path):
    @settings(max_examples=30, deadline=None, database=None)
    @given(st.lists(st.lists(st.integers(0, 300), max_size=9), min_size=1, max_size=9), st.booleans())
    def check(texts, wide):
        for file in tmp_path.iterdir():
            file.unlink()
        ids = np.asarray([token for text in texts for token in text], np.uint32)
        megatron.write(tmp_path / "x", ids, np.asarray([len(text) for text in texts]), 70_000 if wide else 400)
        assert documents(tmp_path / "x") == texts
        assert (tmp_path / "x.bin").stat().st_size == ids.size * (4 if wide else 2)

    check()
    with pytest.raises(DataError, match="exists"):
        megatron.write(tmp_path / "x", np.zeros(1, np.uint16), np.asarray([1]), 400)


def index(code: int, lengths: list[int], firsts: list[int], bounds: list[int]) -> bytes:
    """An index, field by field as Megatron's own writer puts them."""
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(bounds))
    return head + struct.pack(f"<{len(lengths)}i{len(firsts)}q{len(bounds)}q", *lengths, *firsts, *bounds)


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_megatrons_bytes(tmp_path: Path, code: int, dtype: str):
    """A document may be several sequences, and sequences may lie in any order."""
    ids, size = np.asarray([1, 2, 3, 4, 5, 6], dtype), np.dtype(dtype).itemsize
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    (tmp_path / "x.idx").write_bytes(index(code, [2, 1, 3], [4 * size, 0, size], [0, 2, 2, 3]))
    assert documents(tmp_path / "x") == [[5, 6, 1], [], [2, 3, 4]]
    described = describe_source(SourceConfig(path=str(tmp_path / "x.idx")))["files"]
    assert [file["name"] for file in described] == ["x.idx", "x.bin"]


GOOD = index(8, [2, 1], [0, 4], [0, 1, 2])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "no Megatron index"),
        (GOOD[:20], "no Megatron index"),
        (b"X" + GOOD[1:], "no Megatron index"),
        (GOOD[:-8], "cut short"),
        (GOOD + b"\0\0", "multimodal"),
        (GOOD + b"\0\0\0", "damaged or cut short"),
        (GOOD[:9] + b"\x02" + GOOD[10:], "version 2"),
        (GOOD[:17] + b"\x06" + GOOD[18:], "code 6"),
        (GOOD[:18] + b"\xff" * 16 + GOOD[34:], "cut short"),
        (index(8, [2, 2], [0, 4], [0, 1, 2]), "does not belong to x.bin"),
        (index(8, [2, 1], [0, -4], [0, 1, 2]), "does not belong to x.bin"),
        (index(8, [2, -1], [0, 4], [0, 1, 2]), "does not belong to x.bin"),
        (index(8, [2, 1], [0, 4], [0, 2, 1]), "bounds of documents"),
        (index(8, [2, 1], [0, 4], [1, 2]), "bounds of documents"),
        (index(8, [], [], []), "bounds of documents"),
    ],
)
def test_damaged_indexes(tmp_path: Path, raw: bytes, words: str):
    (tmp_path / "x.bin").write_bytes(b"\1\0\2\0\3\0")
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(DataError, match=words):
        documents(tmp_path / "x")


def test_the_data_must_be_there_and_no_id_negative(tmp_path: Path):
    (tmp_path / "x.idx").write_bytes(index(3, [1], [0], [0, 1]))
    with pytest.raises(DataError, match=r"x\.bin beside it"):
        documents(tmp_path / "x")
    (tmp_path / "x.bin").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match="ids from 0 on"):
        documents(tmp_path / "x")
