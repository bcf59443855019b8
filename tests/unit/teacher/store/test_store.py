"""A store as files: written by any number of writers, killed anywhere, read while it grows, and damaged."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kdscale.config.target_store import CODECS, CodecConfig, HiddenConfig, SampledConfig, TopKConfig
from kdscale.errors import DataError, FileError, RunFolderError
from kdscale.files import read_json, write_json
from kdscale.teacher.store import writer as writer_module
from kdscale.teacher.store.format import HEADER_FILE, INDEX, ShardFiles, StoreHeader, read_header
from kdscale.teacher.store.reader import StoreReader
from kdscale.teacher.store.writer import ShardWriter, store_lock, write_header
from tests.integration.forks import fork_ranks
from tests.unit.teacher.store.conftest import LENGTH, block_of, write_shards

Header = Callable[..., StoreHeader]
SETTINGS: list[CodecConfig] = [SampledConfig(draws=12), TopKConfig(top_k=8), HiddenConfig()]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdscale.files.os.fsync", lambda handle: None)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def store(tmp_path: Path, make_header: Header) -> Callable[..., Path]:
    """Writes a whole store; returns its folder."""

    def make(settings: CodecConfig = SETTINGS[1], name: str = "store", **changes: object) -> Path:
        folder, header = tmp_path / name, make_header(settings, **changes)
        write_header(folder, header)
        write_shards(folder, header, range(header.shards))
        return folder

    return make


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.name)
def test_every_sequence_comes_back(store: Callable[..., Path], settings: CodecConfig) -> None:
    reader = StoreReader(store(settings))
    assert {item.name for item in SETTINGS} == set(CODECS) and reader.is_finished
    rows = 0
    for place in range(14):
        found, block = reader.sequence(*reader.header.key(place)), block_of(reader.header, place)
        assert found.kept_S.tolist() == block.kept_S.tolist() and found.tokens == block.tokens
        want = reader.codec.decode(block.packed, int(block.kept_S.sum()))
        assert all(np.array_equal(found.arrays[name], want[name]) for name in want)
        rows += int(block.kept_S.sum())
    assert reader.totals() == (rows, sum(len(data) for name, data in content(reader.folder).items() if "shard" in name))


@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_of_writers_leave_the_same_bytes(
    tmp_path: Path, make_header: Header, store: Callable[..., Path], writers: int
) -> None:
    whole, folder = store(), tmp_path / "shared"
    header = make_header(SETTINGS[1])
    write_header(folder, header)
    for rank in reversed(range(writers)):
        write_shards(folder, header, range(rank, header.shards, writers))
    assert content(folder) == content(whole)


def test_a_writer_that_is_killed_anywhere_goes_on_to_the_same_bytes(
    tmp_path: Path, make_header: Header, store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL, ten times in a row, each in the middle of a write; what was finished before is not written again."""
    whole, folder, header = store(), tmp_path / "killed", make_header(SETTINGS[1])
    write_header(folder, header)
    rng, finished = random.Random(3), 0
    # made before the forks: torch's threads are not there in a fork, and one that waits for them hangs
    blocks = [block_of(header, place) for place in range(header.sequences)]

    def write_and_die(dies_at: int, share: float, _rank: int) -> None:
        monkeypatch.setattr(writer_module.os, "write", _deadly_write(dies_at, share))
        write_shards(folder, header, _unfinished(folder, header), blocks)

    for _ in range(10):
        dies_at, share = rng.randrange(1, 6), rng.random()
        assert fork_ranks(1, partial(write_and_die, dies_at, share), -signal.SIGKILL) == [-signal.SIGKILL]
        there = sum(ShardFiles(folder, shard).index.stat().st_size for shard in _begun(folder, header))
        assert there >= finished - 20  # at most the entry that was half-written is gone
        finished = there
    write_shards(folder, header, _unfinished(folder, header))
    assert content(folder) == content(whole)


def _deadly_write(dies_at: int, share: float) -> Callable[[int, memoryview], int]:
    """os.write whose call number `dies_at` writes a share of its data and kills the process."""
    calls, real = itertools.count(1), os.write

    def write(handle: int, data: memoryview) -> int:
        if next(calls) == dies_at:
            real(handle, data[: round(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(handle, data)

    return write


def _begun(folder: Path, header: StoreHeader) -> list[int]:
    return [shard for shard in range(header.shards) if ShardFiles(folder, shard).index.exists()]


def _unfinished(folder: Path, header: StoreHeader) -> range:
    done = sum(ShardFiles(folder, shard).is_finished for shard in range(header.shards))
    return range(done, header.shards)


def test_what_a_power_cut_left_of_a_block_is_written_again(
    tmp_path: Path, make_header: Header, store: Callable[..., Path]
) -> None:
    """The index may reach the disk before the data does."""
    whole, folder, header = store(), tmp_path / "cut", make_header(SETTINGS[1])
    write_header(folder, header)
    writer = ShardWriter(folder, header, 0)
    for place in range(3):
        writer.append(block_of(header, place))
    writer.close()
    files = ShardFiles(folder, 0)
    data = bytearray(files.data.read_bytes())
    data[-5:] = bytes(5)
    files.data.write_bytes(data)
    assert ShardWriter(folder, header, 0).next == 2
    write_shards(folder, header, range(header.shards))
    assert content(folder) == content(whole)


def test_a_writer_writes_into_files_of_the_store_alone(tmp_path: Path, make_header: Header) -> None:
    folder, header, elsewhere = tmp_path / "store", make_header(SETTINGS[0]), tmp_path / "elsewhere"
    write_header(folder, header)
    elsewhere.write_bytes(b"somebody's")
    ShardFiles(folder, 0).data.symlink_to(elsewhere)
    with pytest.raises(FileError, match=r"shard-00000\.bin is a link"):
        ShardWriter(folder, header, 0)
    assert elsewhere.read_bytes() == b"somebody's"


@pytest.mark.parametrize("end", [1 << 62, 3])
def test_an_index_that_says_nonsense_is_cut_off(tmp_path: Path, make_header: Header, end: int) -> None:
    folder, header = tmp_path / "store", make_header(SETTINGS[0])
    write_header(folder, header)
    writer = ShardWriter(folder, header, 0)
    for place in range(2):
        writer.append(block_of(header, place))
    writer.close()
    index = np.fromfile(ShardFiles(folder, 0).index, INDEX)
    index["end"][1] = end
    index.tofile(ShardFiles(folder, 0).index)
    assert ShardWriter(folder, header, 0).next == 1


def test_a_store_is_read_while_it_is_written(tmp_path: Path, make_header: Header) -> None:
    folder, header = tmp_path / "store", make_header(SETTINGS[0])
    write_header(folder, header)
    reader, writer = StoreReader(folder), ShardWriter(folder, header, 0)
    with pytest.raises(DataError, match=r"no targets of heldout sequence 0 yet"):
        reader.sequence("heldout", 0)
    for place in range(4):
        writer.append(block_of(header, place))
        assert reader.sequence(*header.key(place)).tokens == 1000 + place
    assert not reader.is_finished
    with pytest.raises(DataError, match=r"train sequence 1 yet.*\n.*kdscale targets CONFIG"):
        reader.sequence("train", 1)
    with pytest.raises(DataError, match=r"no targets of train sequence 11\n.*\n.*one of 11 train sequences"):
        reader.sequence("train", 11)
    writer.append(block_of(header, 4))
    writer.finish()
    assert reader.sequence("train", 1).tokens == 1004


def test_one_process_writes_a_store(tmp_path: Path) -> None:
    refused = pytest.raises(RunFolderError, match="is being written by another process")
    with store_lock(tmp_path / "new"), refused, store_lock(tmp_path / "new"):
        pass
    with store_lock(tmp_path / "new"):
        pass


def read_all(folder: Path) -> None:
    reader = StoreReader(folder)
    for place in range(reader.header.sequences):
        reader.sequence(*reader.header.key(place))


def _flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)


def _swap_shards(folder: Path, _: str) -> None:
    """Every file is whole, but in another's place."""
    for end in ("bin", "index", "json"):
        first, second = (folder / f"shard-0000{number}.{end}" for number in (0, 1))
        first.rename(folder / "aside")
        second.rename(first)
        (folder / "aside").rename(second)


def _link(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def _huge(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"format": "kdscale targets", "version": 1, "more": "x" * (1 << 21)}))


def _truncate(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 7)


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _fifo(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


NAMES = ("shard-00000.bin", "shard-00001.index", "shard-00001.json", HEADER_FILE)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (_swap_shards, ""),
        *((harm, name) for harm in (_flip, _link, _huge, _truncate, _fifo) for name in NAMES),
        *((_remove, name) for name in (*NAMES[:2], HEADER_FILE)),  # a shard without a manifest is being written
    ],
)
def test_a_damaged_store_is_one_error(store: Callable[..., Path], harm: Callable[[Path, str], None], name: str) -> None:
    folder = store()
    harm(folder, name)
    with pytest.raises(FileError) as found:
        read_all(folder)
    assert str(folder) in str(found.value)


def test_a_block_of_another_store_is_a_damaged_one(store: Callable[..., Path]) -> None:
    one, other = store(), store(name="other", packing={"seed": 1, "validate_tokens": 60})
    for path in other.glob("shard-00001*"):
        path.replace(one / path.name)
    with pytest.raises(
        FileError, match=r"shard-00001.bin: train sequence 2 is damaged.*\n.*\n.*another store|checksum"
    ):
        read_all(one)


@pytest.mark.parametrize(
    "changes",
    [{"version": 2}, {"format": "other"}, {"train": -1}, {"train": "9"}, {"shard_sequences": 0}, {"more": 1},
     {"codec": {"name": "zip"}}, {"codec": {"name": "topk"}}, {"codec": {"name": "topk", "bits": 7}}, {"share": 2.0},
     {"seq_len": 1 << 40}, {"vocab_size": True}],
)  # fmt: skip
def test_a_header_that_says_something_else_is_refused(store: Callable[..., Path], changes: dict[str, object]) -> None:
    folder = store()
    write_json(folder / HEADER_FILE, {**read_json(folder / HEADER_FILE), **changes})
    with pytest.raises(FileError, match=HEADER_FILE):
        read_header(folder)


def test_lengths_of_sequences_fit_the_header(store: Callable[..., Path]) -> None:
    reader = StoreReader(store())
    assert len(reader.sequence("train", 10).kept_S) == LENGTH
