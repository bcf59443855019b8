"""Reads a store, also one that is still being written: memory-mapped, every block checked when it is first read.

S positions of a sequence, N rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdscale.errors import DataError, FileError
from kdscale.files import sha256_file
from kdscale.teacher.store.codecs import make_codec
from kdscale.teacher.store.format import (
    HELDOUT,
    INDEX,
    Block,
    ShardFiles,
    StoreHeader,
    check_plain,
    checksum,
    read_header,
    read_manifest,
)


class StoredSequence(NamedTuple):
    """What is stored of a sequence."""

    kept_S: NDArray[np.bool_]  # which positions have a row
    arrays: dict[str, NDArray[Any]]  # the codec's, a row for each of them
    tokens: int  # format.tokens_checksum of the sequence


class _Shard:
    """The blocks of one shard that are there."""

    def __init__(self, files: ShardFiles, sequences: int):
        """Raises FileError for files that contradict the manifest, or each other."""
        for path in (files.data, files.index):
            check_plain(path)
        finished = files.is_finished  # asked first: a writer may finish meanwhile
        count = min(files.index.stat().st_size // INDEX.itemsize, sequences)
        self.index = np.fromfile(files.index, INDEX, count)
        size = files.data.stat().st_size
        if finished:
            manifest = read_manifest(files)
            if (manifest.sequences, manifest.bytes) != (count, size) or manifest.sequences != sequences:
                expected = f"{sequences:,} blocks, {manifest.bytes:,} bytes"
                raise _damaged(files.data, expected, f"{count:,} blocks, {size:,} bytes")
            if sha256_file(files.index) != manifest.index_sha256:
                raise _damaged(files.index, "the index that its manifest describes", "another one")
        self.ends = self.index["end"].astype(np.int64)
        if count and not ((np.diff(self.ends, prepend=0) >= 0).all() and self.ends[-1] <= size):
            raise _damaged(files.index, f"blocks within {size:,} bytes", f"ends up to {self.ends.max():,}")
        self.data = np.memmap(files.data, np.uint8, "r") if size else np.empty(0, np.uint8)
        self.checked = np.zeros(count, np.bool_)


class StoreReader:
    """An opened store; `header` says what is in it. Raises FileError for a damaged one."""

    def __init__(self, folder: Path):
        self.folder, self.header = folder, read_header(folder)
        self.codec = make_codec(self.header.settings, self.header.vocab_size, self.header.hidden_size)
        self._identity = self.header.identity
        self._shards: dict[int, _Shard] = {}

    @property
    def is_finished(self) -> bool:
        """Whether all shards are."""
        return all(ShardFiles(self.folder, shard).is_finished for shard in range(self.header.shards))

    def totals(self) -> tuple[int, int]:
        """(rows, bytes of all files) of the shards that are finished."""
        rows = nbytes = 0
        for shard in range(self.header.shards):
            files = ShardFiles(self.folder, shard)
            if files.is_finished:
                manifest = read_manifest(files)
                rows += manifest.rows
                nbytes += manifest.bytes + files.index.stat().st_size + files.manifest.stat().st_size
        return rows, nbytes

    def kept(self, split: str, number: int) -> NDArray[np.bool_]:
        """Which positions of a sequence have a row [S]. Raises as `sequence` does."""
        return self._block(split, number).kept_S

    def sequence(self, split: str, number: int) -> StoredSequence:
        """Raises DataError for a sequence that is not stored, and FileError for a damaged block."""
        block = self._block(split, number)
        try:
            return StoredSequence(block.kept_S, self.codec.decode(block.packed, int(block.kept_S.sum())), block.tokens)
        except FileError as error:
            what = self._name(split, number)
            raise FileError(f"{what} is damaged: {error.what}", expected=error.expected, got=error.got) from error

    def _block(self, split: str, number: int) -> Block:
        place = self.header.place(split, number)
        if place is None:
            raise _not_stored(self.header, self.folder, split, number)
        shard, within = divmod(place, self.header.shard_sequences)
        opened = self._shards.get(shard)
        if opened is None or within >= opened.index.size:
            opened = self._open(shard)
        if opened is None or within >= opened.index.size:
            raise _not_written(self.folder, split, number)
        begin, end = int(opened.ends[within - 1]) if within else 0, int(opened.ends[within])
        entry, packed = opened.index[within], opened.data[begin:end]
        rows, tokens, expected = (int(entry[name]) for name in ("rows", "tokens", "checksum"))
        if not opened.checked[within]:
            found = checksum(self._identity, place, end, rows, tokens, packed)
            if found != expected:
                raise FileError(
                    f"{self._name(split, number)} is damaged", expected=f"checksum {expected:08x}", got=f"{found:08x}",
                    hint=f"it may be of another store; {_HINT}",
                )  # fmt: skip
            opened.checked[within] = True
        map_bytes = -(-self.header.seq_len // 8)
        kept_S = np.unpackbits(packed[:map_bytes], count=self.header.seq_len, bitorder="little").view(np.bool_)
        if int(kept_S.sum()) != rows:
            got = f"{int(kept_S.sum())} positions"
            raise FileError(f"{self._name(split, number)} is damaged", expected=f"{rows} rows", got=got)
        return Block(kept_S, packed[map_bytes:], tokens)

    def _name(self, split: str, number: int) -> str:
        place = self.header.place(split, number)
        assert place is not None
        shard = place // self.header.shard_sequences
        return f"{ShardFiles(self.folder, shard).data}: {split} sequence {number:,}"

    def _open(self, shard: int) -> _Shard | None:
        """A shard as it is now; None where it is not begun."""
        files = ShardFiles(self.folder, shard)
        if not files.index.exists() and not files.is_finished:
            return None
        self._shards[shard] = _Shard(files, len(self.header.in_shard(shard)))
        return self._shards[shard]


_HINT = "delete the shard's three files, and kdscale targets writes it again"


def _damaged(path: Path, expected: str, got: str) -> FileError:
    return FileError(f"{path} is damaged", expected=expected, got=got, hint=_HINT)


def _not_stored(header: StoreHeader, folder: Path, split: str, number: int) -> DataError:
    covered = header.heldout if split == HELDOUT else header.train
    return DataError(
        f"{folder} has no targets of {split} sequence {number:,}",
        expected="a store that covers it",
        got=f"one of {covered:,} {split} sequences",
        hint="train on fewer tokens, or write a store with more (distill.tokens, distill.validate_tokens)",
    )


def _not_written(folder: Path, split: str, number: int) -> DataError:
    return DataError(
        f"{folder} has no targets of {split} sequence {number:,} yet",
        hint="wait for the process that writes the store, or go on with it: kdscale targets CONFIG",
    )
