"""What lies in the folder of a store.

    store.json           written first: the codec, which sequences, and what they were made from
    shard-00000.bin      blocks back to back, one a sequence: a bitmap of its positions with targets, then the codec's
                         bytes of these rows
    shard-00000.index    an entry for each block, written after the block
    shard-00000.json     written last: without it the shard is not finished

Held-out sequences come first, then the training sequences, each in the order of their numbers; a shard holds
`shard_sequences` of them. Which writer wrote a shard changes none of its bytes. The checksum of a block depends on the
store and on the sequence: a block of another store, or in another's place, is a damaged one.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdscale.config.fields import named_entry
from kdscale.config.target_store import CODECS, CodecConfig
from kdscale.errors import FileError
from kdscale.files import read_json, sha256_json

FORMAT: Literal["kdscale targets"] = "kdscale targets"
VERSION: Literal[1] = 1
HEADER_FILE = "store.json"
INDEX = np.dtype([("end", "<u8"), ("rows", "<u4"), ("tokens", "<u4"), ("checksum", "<u4")])
_MAX_HEADER_BYTES = 1 << 20
HELDOUT, TRAIN = "heldout", "train"  # in the order in which they are stored

_Number = Annotated[int, Field(ge=0, le=1 << 48)]
_Size = Annotated[int, Field(ge=1, le=1 << 24)]


class StoreHeader(BaseModel):
    """store.json.

    `made_from`: digests of the teacher's weights, its tokenizer and the tokenised text, and of the student that chose
    the positions; `packing`: the settings that decide which tokens a sequence has.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["kdscale targets"] = FORMAT
    version: Literal[1] = VERSION
    codec: dict[str, str | int | float]
    vocab_size: _Size
    hidden_size: _Size
    seq_len: _Size
    heldout: _Number  # sequences
    train: _Number
    shard_sequences: Annotated[int, Field(ge=1, le=1 << 32)]
    share: Annotated[float, Field(gt=0.0, le=1.0)]  # of the positions of a training sequence
    dtype: str  # in which the teacher ran
    packing: dict[str, int | str]
    made_from: dict[str, str | dict[str, str]]

    @property
    def settings(self) -> CodecConfig:
        """The codec's settings."""
        return named_entry(dict(self.codec), CODECS, CodecConfig, "a codec")

    @property
    def sequences(self) -> int:
        """How many there are in all."""
        return self.heldout + self.train

    @property
    def shards(self) -> int:
        """How many files the sequences are in."""
        return -(-self.sequences // self.shard_sequences)

    @property
    def identity(self) -> int:
        """What begins the checksum of every block."""
        return int(sha256_json(self.model_dump(mode="json"))[:8], 16)

    def place(self, split: str, number: int) -> int | None:
        """Where a sequence is among all; None when the store does not cover it."""
        if split == HELDOUT:
            return number if number < self.heldout else None
        return self.heldout + number if split == TRAIN and number < self.train else None

    def key(self, place: int) -> tuple[str, int]:
        """The split and number of the sequence at a place."""
        return (HELDOUT, place) if place < self.heldout else (TRAIN, place - self.heldout)

    def in_shard(self, shard: int) -> range:
        """The places of the sequences in a shard."""
        return range(shard * self.shard_sequences, min((shard + 1) * self.shard_sequences, self.sequences))


class ShardManifest(BaseModel):
    """shard-00000.json."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Literal[1] = VERSION
    sequences: _Number
    rows: _Number
    bytes: _Number
    index_sha256: str


class Block(NamedTuple):
    """The stored rows of one sequence."""

    kept_S: NDArray[np.bool_]  # which positions have a row
    packed: NDArray[np.uint8]  # the codec's bytes of these rows
    tokens: int  # format.tokens_checksum of the sequence


class ShardFiles:
    """The three files of a shard."""

    def __init__(self, folder: Path, shard: int):
        name = f"shard-{shard:05d}"
        self.data, self.index, self.manifest = (folder / f"{name}.{end}" for end in ("bin", "index", "json"))

    @property
    def is_finished(self) -> bool:
        """Whether its manifest is there."""
        return self.manifest.exists()


def read_header(folder: Path) -> StoreHeader:
    """store.json. Raises FileError where there is none, for another version, and for a damaged one."""
    path = folder / HEADER_FILE
    check_plain(path)
    value = read_json(path, expect=dict, limit=_MAX_HEADER_BYTES)
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise FileError(
            f"{path} is not of a store of targets of this version", expected=f"{FORMAT}, version {VERSION}",
            got=f"{str(value.get('format'))[:80]}, version {str(value.get('version'))[:20]}",
        )  # fmt: skip
    header: StoreHeader = _validated(StoreHeader, value, path)
    try:
        settings = header.settings
    except ValueError as error:
        raise FileError(f"{path} names a codec that this version does not read", got=str(error)[:300]) from error
    if settings.model_dump(mode="json") != header.codec:
        raise FileError(f"{path} is damaged", expected="all settings of its codec", got=str(header.codec)[:300])
    return header


def read_manifest(files: ShardFiles) -> ShardManifest:
    """The manifest of a finished shard. Raises FileError for a damaged one."""
    check_plain(files.manifest)
    manifest: ShardManifest = _validated(
        ShardManifest, read_json(files.manifest, expect=dict, limit=_MAX_HEADER_BYTES), files.manifest
    )
    return manifest


def _validated(model: type[BaseModel], value: Any, path: Path) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, item["loc"])) for item in error.errors()[:8])
        raise FileError(f"{path} is damaged", got=f"wrong: {wrong}", hint="write the store again") from error


def check_plain(path: Path) -> None:
    """Raises FileError unless `path` is a regular file of the folder itself; a link could lead anywhere."""
    if path.is_symlink():
        raise FileError(f"{path} is a link", expected="a file of the store", hint="copy the whole folder of the store")
    if not path.is_file():
        raise FileError(f"{path} is missing" if not path.exists() else f"{path} is not a regular file")


def checksum(identity: int, place: int, end: int, rows: int, tokens: int, block: NDArray[np.uint8]) -> int:
    """Of a block, its place and what its index entry says."""
    start = zlib.crc32(np.array([identity, place, end, rows, tokens], "<u8").tobytes())
    return zlib.crc32(np.ascontiguousarray(block).data, start)


def tokens_checksum(input_ids_S: NDArray[np.int64], position_ids_S: NDArray[np.int64]) -> int:
    """Of the tokens of a sequence and where documents begin in it."""
    return zlib.crc32(np.stack([input_ids_S, position_ids_S]).astype("<i4").tobytes())
