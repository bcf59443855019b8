"""Tokenized text on disk: what every later stage reads.

    folder/manifest.json                      written last: without it the folder does not count
    folder/{train,heldout}/tokens.bin         all documents' token ids, one after another (uint16 or uint32)
                          /offsets.bin        (documents + 1) int64: where each document starts
                          /bytes.bin          (documents) int64: UTF-8 bytes of each document's text
                          /labels.bin         (documents) uint16: index into the manifest's list of source labels
                          /weights.bin        (documents) uint16: how often it is repeated per epoch
    folder/heldout/token_bytes.bin            (tokens) uint32: UTF-8 bytes of each token, for bits per byte

A document is encoded without special tokens and ends with one end-of-text token (0 bytes of text). Held-out documents
are chosen by the hash of their text: a document stays on its side when sources are added, and equal texts never fall on
both sides.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdscale.config.data import SourceConfig
from kdscale.data.sources import Document, describe_source, is_local, read_documents
from kdscale.data.tokenizing import BatchEncoder, EncodedText
from kdscale.errors import ConfigError, DataError
from kdscale.files import atomic_dir, read_json, write_json
from kdscale.runtime.progress import Bar, Reporter

SPLITS = ("train", "heldout")
_VERSION = 1
_BATCH_DOCUMENTS, _BATCH_CHARS = 256, 2_000_000  # whichever comes first; bounds memory for long documents
_SHORTEST_PIECE = 4  # tokens; the least that data.max_document_tokens may be
_MAX_LABELS, _MAX_WEIGHT = 1 << 16, (1 << 16) - 1


@dataclass(frozen=True)
class TokenSplit:
    """One split, memory-mapped. All arrays are read-only; `D` documents, `T` tokens."""

    documents: int
    tokens: int
    eos_id: int
    source_labels: tuple[str, ...]
    tokens_T: np.ndarray
    offsets_D1: np.ndarray
    bytes_D: np.ndarray  # UTF-8 bytes of each document's text
    labels_D: np.ndarray  # index into source_labels
    weights_D: np.ndarray
    token_bytes_T: np.ndarray | None  # held-out only

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.bytes_D.sum())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (D,)."""
        return np.diff(self.offsets_D1)

    def document_tokens(self, i: int) -> np.ndarray:
        """Token ids of document `i`, end-of-text included (except in all but the last piece of a cut document)."""
        return self.tokens_T[self.offsets_D1[i] : self.offsets_D1[i + 1]]

    def document_token_bytes(self, i: int) -> np.ndarray:
        """UTF-8 bytes of each token of document `i`. Raises DataError on the train split, which keeps none."""
        if self.token_bytes_T is None:
            raise DataError("bytes of single tokens are kept for the held-out split only")
        return self.token_bytes_T[self.offsets_D1[i] : self.offsets_D1[i + 1]]


class TokenStore:
    """An opened store; `manifest` says how it was made."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store in `folder`.

        Raises DataError where there is no manifest (it was never finished), for another version of the format, and for
        a file of the wrong size.
        """
        if not (folder / "manifest.json").is_file():
            raise DataError(f"{folder} holds no finished token store", expected="manifest.json", hint="build it again")
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("version") != _VERSION:
            raise DataError(f"{folder} is not a token store of this version", hint="delete it and build it again")
        for name, size in manifest["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise DataError(
                    f"{folder / name} is damaged", expected=f"{size} bytes", hint="delete the folder and build it again"
                )
        return cls(folder, manifest)

    def split(self, name: str) -> TokenSplit:
        """The split `train` or `heldout`, memory-mapped."""
        if name not in SPLITS:
            raise ConfigError(f"split {name!r}", expected=" or ".join(SPLITS))
        facts, folder = self.manifest["splits"][name], self.folder / name
        tokens = np.memmap(folder / "tokens.bin", dtype=self.manifest["dtype"], mode="r")
        return TokenSplit(
            documents=facts["documents"],
            tokens=facts["tokens"],
            eos_id=self.manifest["eos_id"],
            source_labels=tuple(self.manifest["source_labels"]),
            tokens_T=tokens,
            offsets_D1=np.fromfile(folder / "offsets.bin", dtype=np.int64),
            bytes_D=np.fromfile(folder / "bytes.bin", dtype=np.int64),
            labels_D=np.fromfile(folder / "labels.bin", dtype=np.uint16),
            weights_D=np.fromfile(folder / "weights.bin", dtype=np.uint16),
            token_bytes_T=np.memmap(folder / "token_bytes.bin", dtype=np.uint32, mode="r")
            if name == "heldout"
            else None,
        )

    @classmethod
    def build(
        cls,
        folder: Path,
        sources: Sequence[SourceConfig],
        tokenizer: Any,
        *,
        eos_id: int,
        reporter: Reporter,
        heldout_fraction: float = 0.05,
        heldout_sources: Sequence[SourceConfig] = (),
        vocab_size: int | None = None,
        max_document_tokens: int | None = None,
    ) -> TokenStore:
        """Read, split, tokenize and write; `folder` appears complete or not at all (an old one is replaced).

        `tokenizer` is a fast transformers tokenizer; `eos_id` ends each document (see tokenizing.document_end_id).
        `vocab_size` is the model's: ids beyond it are refused. `heldout_sources`, when given, replaces the fraction.
        Documents longer than `max_document_tokens` are cut into equal pieces, each a document of its own. Documents
        of fewer than two tokens have nothing to predict; they are left out and counted.

        Raises DataError for unreadable sources, an empty split and ids beyond the vocabulary. Every local file is read
        and checked before anything is tokenized.
        """
        if max_document_tokens is not None and max_document_tokens < _SHORTEST_PIECE:
            raise ConfigError(
                "data.max_document_tokens", expected=f"at least {_SHORTEST_PIECE}", got=str(max_document_tokens)
            )
        for source in (*sources, *heldout_sources):
            if source.weight > _MAX_WEIGHT:
                raise ConfigError(f"weight of {source.path}", expected=f"at most {_MAX_WEIGHT}", got=str(source.weight))
        encoder = BatchEncoder(tokenizer)
        vocab = vocab_size if vocab_size is not None else max(tokenizer.get_vocab().values()) + 1
        _check_vocab(eos_id, vocab)
        survey = _survey(sources, heldout_sources, heldout_fraction)
        with atomic_dir(folder) as tmp, reporter.bar("Tokenizing", survey.text_bytes, "B") as bar:
            builder = _StoreBuilder(tmp, encoder, eos_id, vocab, max_document_tokens, bar)
            builder.add_all(survey)
            write_json(tmp / "manifest.json", builder.finish(survey))
        store = cls.open(folder)
        reporter.say(_summary(store.manifest))
        return store


@dataclass(frozen=True)
class _Survey:
    """What one reading of every local source, without tokenizing, found out."""

    sources: tuple[SourceConfig, ...]
    heldout_sources: tuple[SourceConfig, ...]
    heldout_fraction: float
    heldout_hashes: frozenset[bytes]  # of the texts of heldout_sources
    text_bytes: int
    description: dict[str, Any]

    def in_heldout(self, text_hash: bytes) -> bool:
        """Whether a document of `sources` is held out by the fraction: a pure function of its text."""
        return not self.heldout_sources and int.from_bytes(text_hash[:8], "big") < self.heldout_fraction * 2.0**64


def _survey(sources: Sequence[SourceConfig], heldout: Sequence[SourceConfig], fraction: float) -> _Survey:
    """Read every local source to its end, so that every bad line is reported before anything is tokenized."""
    size, hashes = 0, set()
    for source in heldout:
        for document in read_documents(source):
            hashes.add(_hash(document.text))
            size += len(document.text.encode("utf-8")) if is_local(source) else 0
    for source in sources:
        if is_local(source):
            size += sum(len(document.text.encode("utf-8")) for document in read_documents(source))
    description: dict[str, Any] = {"sources": [describe_source(source) for source in sources]}
    if heldout:
        description["heldout_sources"] = [describe_source(source) for source in heldout]
    else:
        description["heldout_fraction"] = fraction
    return _Survey(tuple(sources), tuple(heldout), fraction, frozenset(hashes), size, description)


class _StoreBuilder:
    """Tokenizes batch after batch into the two splits' files; `max_tokens` is the longest a document may be."""

    def __init__(self, folder: Path, encoder: BatchEncoder, eos_id: int, vocab: int, max_tokens: int | None, bar: Bar):
        self._encoder, self._eos_id, self._vocab, self._max_tokens, self._bar = encoder, eos_id, vocab, max_tokens, bar
        self._dtype = "uint16" if vocab <= 1 << 16 else "uint32"
        self._folder = folder
        self._splits = {name: _SplitWriter(folder / name, self._dtype, keep_bytes=name == "heldout") for name in SPLITS}
        self._labels: dict[str, int] = {}
        self._dropped: Counter[str] = Counter(short=0, train_text_is_held_out=0)

    def add_all(self, survey: _Survey) -> None:
        """Tokenize all documents, each into its split."""
        train = ((s.weight, d) for s in survey.sources for d in read_documents(s))
        held_out = ((1, d) for s in survey.heldout_sources for d in read_documents(s))
        if survey.heldout_sources:
            self._add(held_out, lambda _: "heldout")
            self._add(train, lambda text_hash: None if text_hash in survey.heldout_hashes else "train")
        else:
            self._add(train, lambda text_hash: "heldout" if survey.in_heldout(text_hash) else "train")

    def finish(self, survey: _Survey) -> dict[str, Any]:
        """Close the files; returns the manifest. Raises DataError for a split without documents."""
        splits = {name: writer.close() for name, writer in self._splits.items()}
        for name, facts in splits.items():
            if not facts["documents"]:
                in_other_split = sum(split["documents"] for split in splits.values())
                read = ", ".join(source.path for source in (*survey.sources, *survey.heldout_sources))
                raise DataError(
                    f"no document of {read} is left for the {name} split",
                    expected="at least one document of two tokens or more in each split",
                    got="; ".join([f"{in_other_split} in the other split", *_left_out(self._dropped)]),
                    hint="give more documents (a .txt file is one document), set data.heldout_sources, "
                    "or change data.heldout_fraction",
                )
        files = sorted(item for item in self._folder.rglob("*") if item.is_file())
        return {
            "version": _VERSION,
            "dtype": self._dtype,
            "eos_id": self._eos_id,
            "vocab_size": self._vocab,
            "max_document_tokens": self._max_tokens,
            "tokenizer_sha256": self._encoder.sha256,
            "source_labels": list(self._labels),
            "splits": splits,
            "dropped": dict(self._dropped),
            "files": {item.relative_to(self._folder).as_posix(): item.stat().st_size for item in files},
            **survey.description,
        }

    def _add(self, documents: Iterable[tuple[int, Document]], split_of: Callable[[bytes], str | None]) -> None:
        for batch in _batches(documents):
            encoded = self._encoder.encode([document.text for _, document in batch])
            for (weight, document), text in zip(batch, encoded, strict=True):
                split = split_of(_hash(document.text))
                if split is None:
                    self._dropped["train_text_is_held_out"] += 1
                else:
                    self._add_document(document, text, self._splits[split], weight if split == "train" else 1)
            self._bar.advance(sum(len(document.text.encode("utf-8")) for _, document in batch))

    def _add_document(self, document: Document, text: EncodedText, writer: _SplitWriter, weight: int) -> None:
        if text.ids.size and (worst := int(text.ids.max())) >= self._vocab:
            _check_vocab(worst, self._vocab)
        ids, sizes = np.append(text.ids, self._eos_id), np.append(text.bytes, 0)
        if ids.size < 2:
            self._dropped["short"] += 1
            return
        label = self._labels.setdefault(document.source, len(self._labels))
        if label >= _MAX_LABELS:
            raise DataError("too many different source labels", expected=f"at most {_MAX_LABELS}")
        pieces = -(-ids.size // self._max_tokens) if self._max_tokens else 1
        for piece_ids, piece_sizes in zip(np.array_split(ids, pieces), np.array_split(sizes, pieces), strict=True):
            writer.add(piece_ids, piece_sizes, label, weight)


class _SplitWriter:
    """Appends documents to one split's files. Only 20 bytes per document stay in memory."""

    def __init__(self, folder: Path, dtype: str, keep_bytes: bool):
        folder.mkdir()
        self._folder, self._dtype = folder, dtype
        self._tokens = (folder / "tokens.bin").open("wb")
        self._token_bytes = (folder / "token_bytes.bin").open("wb") if keep_bytes else None
        self._offsets, self._bytes = array("q", [0]), array("q")
        self._labels, self._weights = array("H"), array("H")

    def add(self, ids: np.ndarray, sizes: np.ndarray, label: int, weight: int) -> None:
        """Append a document: its token ids, and the UTF-8 bytes of each."""
        self._tokens.write(ids.astype(self._dtype).tobytes())
        if self._token_bytes is not None:
            self._token_bytes.write(sizes.astype(np.uint32).tobytes())
        self._offsets.append(self._offsets[-1] + ids.size)
        self._bytes.append(int(sizes.sum()))
        self._labels.append(label)
        self._weights.append(weight)

    def close(self) -> dict[str, int]:
        """Write what was kept in memory; returns the split's counts."""
        self._tokens.close()
        if self._token_bytes is not None:
            self._token_bytes.close()
        columns = {"offsets": self._offsets, "bytes": self._bytes, "labels": self._labels, "weights": self._weights}
        for name, column in columns.items():
            (self._folder / f"{name}.bin").write_bytes(column.tobytes())
        return {"documents": len(self._bytes), "tokens": self._offsets[-1], "bytes": sum(self._bytes)}


def _batches(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    batch: list[tuple[int, Document]] = []
    chars = 0
    for item in documents:
        batch.append(item)
        chars += len(item[1].text)
        if len(batch) >= _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _check_vocab(token_id: int, vocab: int) -> None:
    if not 0 <= token_id < vocab:
        raise DataError(
            "the tokenizer does not belong to the model",
            expected=f"token ids below the model's vocab_size {vocab}",
            got=f"token id {token_id}",
            hint="the teacher's folder mixes files of two models; take tokenizer and weights from the same one",
        )


def _summary(manifest: dict[str, Any]) -> str:
    train, held, dropped = manifest["splits"]["train"], manifest["splits"]["heldout"], manifest["dropped"]
    text = (
        f"Text: {train['documents']:,} documents, {train['tokens']:,} tokens to train on; "
        f"{held['documents']:,} documents, {held['tokens']:,} tokens held out"
    )
    return "; ".join([text, *_left_out(dropped)])


def _left_out(dropped: Mapping[str, int]) -> list[str]:
    notes = {"short": "with fewer than two tokens", "train_text_is_held_out": "whose text is held out"}
    return [f"{dropped[key]} documents {note} left out" for key, note in notes.items() if dropped[key]]
