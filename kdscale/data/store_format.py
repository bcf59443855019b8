"""The files of a token store: how one split is written, and the check of a finished store's manifest.

folder/manifest.json                      written last: without it the folder does not count
folder/{train,heldout}/tokens.bin         all documents' token ids, one after another (uint16 or uint32)
                      /offsets.bin        (documents + 1) int64: where each document starts
                      /bytes.bin          (documents) int64: UTF-8 bytes of each document's text
                      /labels.bin         (documents) uint16: index into the manifest's list of source labels
                      /sources.bin        (documents) uint16: index into the manifest's sources
                      /loss.bin           (tokens) bits: which tokens are labels; only where some are not
                      /classes.bin        (documents) int32: the class of each document, or UNKNOWN_CLASS; only where
                                          some are known
folder/heldout/token_bytes.bin            (tokens) uint32: UTF-8 bytes of each token, for bits per byte
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdscale.config.data import BlendConfig
from kdscale.errors import DataError
from kdscale.files import read_json, safe_join

Facts = dict[str, Any]

SPLITS = ("train", "heldout")
STORE_VERSION = 3
LOSS_FILE, CLASSES_FILE = "loss.bin", "classes.bin"
UNKNOWN_CLASS = -1
_COLUMNS = {"offsets": np.int64, "bytes": np.int64, "labels": np.uint16, "sources": np.uint16}  # of each document
_MASK_BLOCK = 1 << 20  # bytes of a mask that are written at once

_Number = Annotated[int, Field(ge=0, le=1 << 62)]


class _SplitCounts(BaseModel):
    model_config = ConfigDict(strict=True)
    documents: _Number
    tokens: _Number
    bytes: _Number


class _SourceFacts(BaseModel):
    model_config = ConfigDict(strict=True)
    weight: Annotated[int, Field(ge=1, le=1 << 15)]
    tag: str | None
    path: str


class _LeakFacts(BaseModel):
    model_config = ConfigDict(strict=True)
    tokens: _Number
    documents: _Number
    covered: float
    examples: list[str]
    dropped: bool = False


class _EncoderFacts(BaseModel):
    model_config = ConfigDict(strict=True)
    mask_id: _Number | None
    special_ids: list[_Number]


class _StoreManifest(BaseModel):
    """What is read of a store's manifest.json."""

    model_config = ConfigDict(strict=True)
    dtype: Literal["uint16", "uint32"]
    eos_id: _Number
    prefix_ids: list[_Number]
    source_labels: list[str]
    splits: dict[Literal["train", "heldout"], _SplitCounts] = Field(min_length=len(SPLITS))
    dropped: dict[str, _Number]
    files: dict[str, _Number]
    sources: list[_SourceFacts]
    heldout_sources: list[_SourceFacts] = []
    blend: BlendConfig | None = None
    leaks: _LeakFacts | None = None
    encoder: _EncoderFacts | None = None


def name_in_blend(source: Facts) -> str:
    """What a blend calls a source of a manifest, as `SourceConfig.name` says."""
    return str(source["tag"] or source["path"])


def read_store_manifest(folder: Path) -> Facts:
    """manifest.json of a token store, which is written last.

    Raises DataError where there is none, for another version of the format, and for files of the wrong size.
    """
    if not (folder / "manifest.json").is_file():
        raise DataError(f"{folder} holds no finished token store", expected="manifest.json", hint="build it again")
    manifest: Facts = read_json(folder / "manifest.json", DataError, expect=dict)
    if manifest.get("version") != STORE_VERSION:
        raise DataError(
            f"{folder} is not a token store of this version",
            expected=f"version {STORE_VERSION} of the format",
            got=str(manifest.get("version"))[:80],
            hint="another version of kdscale wrote it: delete the folder and run the stage `data` again",
        )
    try:
        _StoreManifest.model_validate(manifest)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, item["loc"])) for item in error.errors()[:8])
        hint = "delete the folder and build it again"
        raise DataError(f"{folder / 'manifest.json'} is damaged", got=f"wrong: {wrong}", hint=hint) from error
    names = {f"{split}/{name}.bin" for split in SPLITS for name in ("tokens", *_COLUMNS)} | {"heldout/token_bytes.bin"}
    for name in sorted({*names, *manifest["files"]}):
        size, file = manifest["files"].get(name), safe_join(folder, name)
        if size is None or not file.is_file() or file.stat().st_size != size:
            raise DataError(f"{file} is damaged", expected=f"{size} bytes", hint="delete the folder and build it again")
    return manifest


class SplitWriter:
    """Appends documents to one split's files. Only 24 bytes per document stay in memory."""

    def __init__(self, folder: Path, dtype: str, keep_bytes: bool):
        folder.mkdir()
        self._folder, self._dtype = folder, dtype
        self._tokens = (folder / "tokens.bin").open("wb")
        self._token_bytes = (folder / "token_bytes.bin").open("wb") if keep_bytes else None
        self._loss: _BitWriter | None = None
        self._offsets, self._bytes = array("q", [0]), array("q")
        self._labels, self._sources, self._classes = array("H"), array("H"), array("i")

    def add(self, tokens_3T: np.ndarray, label: int, source: int, class_: int = UNKNOWN_CLASS) -> None:
        """Append a document: ids, UTF-8 bytes of each token, and 1 where it is a label; int64 (3, T)."""
        ids, sizes, is_label = tokens_3T
        if self._loss is None and not is_label.all():
            self._loss = _BitWriter(self._folder / LOSS_FILE, ones=self._offsets[-1])
        if self._loss is not None:
            self._loss.add(is_label.astype(bool))
        self._tokens.write(ids.astype(self._dtype).tobytes())
        if self._token_bytes is not None:
            self._token_bytes.write(sizes.astype(np.uint32).tobytes())
        self._offsets.append(self._offsets[-1] + ids.size)
        self._bytes.append(int(sizes.sum()))
        self._labels.append(label)
        self._sources.append(source)
        self._classes.append(class_)

    def close(self) -> dict[str, int]:
        """Write what was kept in memory; returns the split's counts."""
        self._tokens.close()
        if self._token_bytes is not None:
            self._token_bytes.close()
        if self._loss is not None:
            self._loss.close()
        columns = (self._offsets, self._bytes, self._labels, self._sources)
        for name, column in zip(_COLUMNS, columns, strict=True):
            (self._folder / f"{name}.bin").write_bytes(column.tobytes())
        if any(class_ != UNKNOWN_CLASS for class_ in self._classes):
            (self._folder / CLASSES_FILE).write_bytes(np.asarray(self._classes, np.int32).tobytes())
        return {"documents": len(self._bytes), "tokens": self._offsets[-1], "bytes": sum(self._bytes)}


class _BitWriter:
    """Writes one bit for each token, the first token in a byte's highest bit; `ones` tokens have theirs set already."""

    def __init__(self, path: Path, ones: int):
        self._file = path.open("wb")
        whole, rest = divmod(ones, 8)
        for start in range(0, whole, _MASK_BLOCK):
            self._file.write(b"\xff" * min(_MASK_BLOCK, whole - start))
        self._rest = np.ones(rest, bool)  # fewer than 8 bits

    def add(self, bits: np.ndarray) -> None:
        bits = np.concatenate((self._rest, bits))
        whole = bits.size - bits.size % 8
        self._file.write(np.packbits(bits[:whole]).tobytes())
        self._rest = bits[whole:]

    def close(self) -> None:
        self._file.write(np.packbits(self._rest).tobytes())
        self._file.close()


def keep_documents(folder: Path, dtype: str, kept: np.ndarray) -> dict[str, int]:
    """Write a finished training split anew with the documents `kept` (numbers, ascending); returns its counts."""
    columns = {name: np.fromfile(folder / f"{name}.bin", kind) for name, kind in _COLUMNS.items()}
    offsets = columns.pop("offsets")
    tokens = np.memmap(folder / "tokens.bin", dtype, mode="r")
    has_loss = (folder / LOSS_FILE).is_file()
    loss = np.fromfile(folder / LOSS_FILE, np.uint8) if has_loss else None
    new_tokens, new_loss = folder / "tokens.kept", folder / "loss.kept"
    bits = _BitWriter(new_loss, ones=0) if has_loss else None
    with new_tokens.open("wb") as stream:
        for document in kept.tolist():
            first, end = int(offsets[document]), int(offsets[document + 1])
            stream.write(tokens[first:end].tobytes())
            if bits is not None and loss is not None:
                bits.add(read_bits(loss, first, end))
    new_tokens.replace(folder / "tokens.bin")
    if bits is not None:
        bits.close()
        new_loss.replace(folder / LOSS_FILE)
    lengths = np.diff(offsets)[kept]
    np.concatenate(([0], np.cumsum(lengths))).astype(np.int64).tofile(folder / "offsets.bin")
    for name, column in columns.items():
        column[kept].tofile(folder / f"{name}.bin")
    if (folder / CLASSES_FILE).is_file():
        np.fromfile(folder / CLASSES_FILE, np.int32)[kept].tofile(folder / CLASSES_FILE)
    return {"documents": int(kept.size), "tokens": int(lengths.sum()), "bytes": int(columns["bytes"][kept].sum())}


def read_bits(packed: np.ndarray, start: int, end: int) -> np.ndarray:
    """Bits `start` to `end` of what was packed, as booleans."""
    first = start // 8
    return np.unpackbits(packed[first : -(-end // 8)])[start - 8 * first : end - 8 * first].astype(bool)
