"""Writes the shards of a store, block by block. Killed at any instant, it goes on after the last whole block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdscale.errors import RunFolderError
from kdscale.files import explain_os_errors, fsync_dir, fsync_file, sha256_file, write_json
from kdscale.runtime.locks import try_lock
from kdscale.teacher.store.format import (
    HEADER_FILE,
    INDEX,
    Block,
    ShardFiles,
    ShardManifest,
    StoreHeader,
    check_plain,
    checksum,
)

_SYNC_BYTES = 64 << 20  # written between two flushes to the disk


@contextmanager
def store_lock(folder: Path) -> Iterator[None]:
    """Hold a store for this process, which is about to write it. Raises RunFolderError when another one writes it."""
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not try_lock(handle):
            raise RunFolderError(
                f"{folder} is being written by another process",
                hint="wait until it has finished, or give this run its own targets.path",
            )
        yield
    finally:
        os.close(handle)


def write_header(folder: Path, header: StoreHeader) -> None:
    """Begin a store."""
    write_json(folder / HEADER_FILE, header.model_dump(mode="json"))


class ShardWriter:
    """Appends blocks to one shard, in the order of their places; `next` is the place of the next one."""

    def __init__(self, folder: Path, header: StoreHeader, shard: int):
        """What a killed writer left half-written is cut off; nothing that it finished is written again."""
        self._identity, self._files, self._places = header.identity, ShardFiles(folder, shard), header.in_shard(shard)
        with explain_os_errors(self._files.data):
            for path in (self._files.data, self._files.index):
                if os.path.lexists(path):
                    check_plain(path)
                else:
                    path.touch()
            self._index, self._end = self._whole_blocks()
            os.truncate(self._files.index, self._index.nbytes)
            os.truncate(self._files.data, self._end)
        self.next = self._places.start + self._index.size
        self._data_stream = self._files.data.open("ab", buffering=0)
        self._index_stream = self._files.index.open("ab", buffering=0)
        self._rows, self._unsynced = int(self._index["rows"].sum()), 0

    def append(self, block: Block) -> None:
        """Write the block of the sequence at place `next`."""
        packed = np.concatenate([np.packbits(block.kept_S, bitorder="little"), block.packed])
        end, rows = self._end + packed.size, int(block.kept_S.sum())
        of_block = checksum(self._identity, self.next, end, rows, block.tokens, packed)
        entry = np.array([(end, rows, block.tokens, of_block)], INDEX)
        with explain_os_errors(self._files.data):
            _write_all(self._data_stream.fileno(), packed.tobytes())
            _write_all(self._index_stream.fileno(), entry.tobytes())
        self.next, self._end, self._rows = self.next + 1, end, self._rows + rows
        self._unsynced += packed.size
        if self._unsynced > _SYNC_BYTES:
            self._sync()

    def finish(self) -> None:
        """Flush the shard to the disk and write its manifest. All its blocks must be there."""
        assert self.next == self._places.stop, "a shard is finished when all its sequences are in it"
        self._sync()
        self.close()
        manifest = ShardManifest(
            sequences=len(self._places), rows=self._rows, bytes=self._end, index_sha256=sha256_file(self._files.index)
        )
        fsync_dir(self._files.data.parent)
        write_json(self._files.manifest, manifest.model_dump(mode="json"))

    def close(self) -> None:
        """Leave the shard as it is; another writer goes on with it."""
        self._data_stream.close()
        self._index_stream.close()

    def _sync(self) -> None:
        with explain_os_errors(self._files.data):
            fsync_file(self._files.data)
            fsync_file(self._files.index)
        self._unsynced = 0

    def _whole_blocks(self) -> tuple[NDArray[np.void], int]:
        """The entries of the index up to the first block that is not whole, and where the data of these ends."""
        count = min(self._files.index.stat().st_size // INDEX.itemsize, len(self._places))
        index = np.fromfile(self._files.index, INDEX, count)
        end, there = 0, self._files.data.stat().st_size
        with self._files.data.open("rb") as stream:
            for number, entry in enumerate(index):
                size = int(entry["end"]) - end
                if not 0 <= size <= there - end:
                    return index[:number], end
                block = np.frombuffer(stream.read(size), np.uint8)
                place, (rows, tokens) = self._places[number], (int(entry["rows"]), int(entry["tokens"]))
                found = checksum(self._identity, place, int(entry["end"]), rows, tokens, block)
                if found != int(entry["checksum"]):
                    return index[:number], end
                end += size
        return index, end


def _write_all(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]
