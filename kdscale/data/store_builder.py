"""Writes a token store: reads every source once to check it, then tokenises document after document into the splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdscale.config.data import SourceConfig
from kdscale.data.encoder_processes import EncoderProcesses, usable_cores
from kdscale.data.sources import Document, describe_source, is_local, read_documents
from kdscale.data.store_format import SPLITS, STORE_VERSION, Facts, SplitWriter
from kdscale.data.tokenizing import NO_SPECIAL_TOKENS, BatchEncoder, EncodedText, SpecialTokens, tokens_of_spans
from kdscale.errors import DataError
from kdscale.runtime.progress import Bar

_BATCH_DOCUMENTS, _BATCH_CHARS = 256, 250_000  # whichever comes first; the library takes 140 bytes a character
_MANY_BYTES = 32 << 20  # of text, from which on starting processes pays
_OTHER, _MAX_LABELS = "other", 1 << 16


@dataclass(frozen=True)
class DocumentFormat:
    """How a document becomes tokens."""

    eos_id: int  # ends each document, where `special` has no suffix
    vocab_size: int  # of the model; a token id from here on has no row in its embedding
    special: SpecialTokens = NO_SPECIAL_TOKENS
    max_tokens: int | None = None  # a longer document is cut into equal ones

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What is appended to each document's tokens."""
        return self.special.suffix or (self.eos_id,)


@dataclass(frozen=True)
class Survey:
    """What one reading of every local source, without tokenising, found out."""

    sources: tuple[SourceConfig, ...]
    heldout_sources: tuple[SourceConfig, ...]
    heldout_fraction: float
    heldout_hashes: frozenset[bytes]  # of the texts of heldout_sources
    text_bytes: int

    def in_heldout(self, text_hash: bytes) -> bool:
        """Whether a document of `sources` is held out by the fraction: a pure function of its text."""
        return not self.heldout_sources and int.from_bytes(text_hash[:8], "big") < self.heldout_fraction * 2.0**64


def describe_sources(sources: Sequence[SourceConfig], heldout: Sequence[SourceConfig], fraction: float) -> Facts:
    """What identifies the text and how it is split, for the manifest; reads every local file for its digest."""
    described = [describe_source(source) for source in sources]
    if heldout:
        return {"sources": described, "heldout_sources": [describe_source(source) for source in heldout]}
    return {"sources": described, "heldout_fraction": fraction}


def survey_sources(sources: Sequence[SourceConfig], heldout: Sequence[SourceConfig], fraction: float) -> Survey:
    """Read every local source to its end, so that every bad line is reported before anything is tokenised."""
    size, hashes = 0, set()
    for source in heldout:
        for document in read_documents(source):
            hashes.add(_hash(document.text))
            size += len(document.text.encode("utf-8")) if is_local(source) else 0
    for source in sources:
        if is_local(source):
            size += sum(len(document.text.encode("utf-8")) for document in read_documents(source))
    return Survey(tuple(sources), tuple(heldout), fraction, frozenset(hashes), size)


class StoreBuilder:
    """Tokenises batch after batch into the two splits' files; `processes` of None starts some for much text."""

    def __init__(self, folder: Path, encoder: BatchEncoder, form: DocumentFormat, processes: int | None, bar: Bar):
        self._folder, self._encoder, self._format = folder, encoder, form
        self._processes, self._bar = processes, bar
        self._dtype = "uint16" if form.vocab_size <= 1 << 16 else "uint32"
        self._splits = {name: SplitWriter(folder / name, self._dtype, keep_bytes=name == "heldout") for name in SPLITS}
        self._labels: dict[str, int] = {}
        self._dropped: Counter[str] = Counter(short=0, train_text_is_held_out=0)

    def add_all(self, survey: Survey) -> None:
        """Tokenise all documents, each into its split."""
        train, held_out = _numbered(survey.sources), _numbered(survey.heldout_sources)
        processes = self._processes or (usable_cores() if survey.text_bytes >= _MANY_BYTES else 1)
        with EncoderProcesses(self._encoder, processes) as encoders:
            if survey.heldout_sources:
                self._add(encoders, held_out, lambda _: "heldout")
                self._add(encoders, train, lambda digest: None if digest in survey.heldout_hashes else "train")
            else:
                self._add(encoders, train, lambda digest: "heldout" if survey.in_heldout(digest) else "train")

    def finish(self, survey: Survey) -> Facts:
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
                    hint="give more documents (a .txt file below 128 KiB is one document), set data.heldout_sources, "
                    "or change data.heldout_fraction",
                )
        files = sorted(item for item in self._folder.rglob("*") if item.is_file())
        return {
            "version": STORE_VERSION,
            "dtype": self._dtype,
            "eos_id": self._format.eos_id,
            "prefix_ids": list(self._format.special.prefix),
            "end_ids": list(self._format.end_ids),
            "vocab_size": self._format.vocab_size,
            "max_document_tokens": self._format.max_tokens,
            "tokenizer_sha256": self._encoder.sha256,
            "source_labels": list(self._labels),
            "splits": splits,
            "dropped": dict(self._dropped),
            "files": {item.relative_to(self._folder).as_posix(): item.stat().st_size for item in files},
        }

    def _add(
        self,
        encoders: EncoderProcesses,
        documents: Iterable[tuple[int, Document]],
        split_of: Callable[[bytes], str | None],
    ) -> None:
        for batch, encoded in encoders.encode(_batches(documents), lambda batch: [item.text for _, item in batch]):
            for (source, document), text in zip(batch, encoded, strict=True):
                split = split_of(_hash(document.text))
                if split is None:
                    self._dropped["train_text_is_held_out"] += 1
                else:
                    self._add_document(document, text, self._splits[split], source)
            self._bar.advance(sum(len(document.text.encode("utf-8")) for _, document in batch))

    def _add_document(self, document: Document, text: EncodedText, writer: SplitWriter, source: int) -> None:
        if not text.ids.size:
            self._dropped["short"] += 1
            return
        if (worst := int(text.ids.max())) >= self._format.vocab_size:
            raise token_without_row(worst, self._format.vocab_size, self._encoder.token(worst), document.source)
        tokens_3T, limit = document_tokens(document, text, self._format), self._format.max_tokens
        label, count = self._label(document.source), -(-tokens_3T.shape[1] // limit) if limit else 1
        for cut in np.array_split(tokens_3T, count, axis=1):
            writer.add(cut, label, source)

    def _label(self, source: str) -> int:
        """The number of a source. Those that come after the 65,535th share one, "other": a number has 16 bits."""
        if source not in self._labels and len(self._labels) >= _MAX_LABELS - 1:
            source = _OTHER
        return self._labels.setdefault(source, len(self._labels))


def document_tokens(document: Document, text: EncodedText, form: DocumentFormat) -> np.ndarray:
    """A document's tokens as the store has them, int64 (3, T): id, UTF-8 bytes, and 1 where the token is a label.

    What ends a document ends it, also where a chat template has put the same there. What begins one is left out, as
    packing adds it. The end of a chat is a label only where the last answer reaches it.
    """
    end_ids, size = form.end_ids, text.ids.size
    if document.answers is None:
        tokens_3T = np.stack([text.ids, text.bytes, np.ones(size, np.int64)])
        learned = True
    else:
        tokens_3T = np.stack([text.ids, text.bytes, tokens_of_spans(document.text, text.bytes, document.answers)])
        learned = bool(document.answers) and document.answers[-1][1] == len(document.text)
        if (prefix := len(form.special.prefix)) and tuple(text.ids[:prefix]) == form.special.prefix:
            tokens_3T = tokens_3T[:, prefix:]
        if tuple(text.ids[-len(end_ids) :]) == end_ids:
            learned = bool(tokens_3T[2, -1])
            tokens_3T = tokens_3T[:, : -len(end_ids)]
    return np.append(tokens_3T, [end_ids, [0] * len(end_ids), [learned] * len(end_ids)], axis=1)


def _numbered(sources: Sequence[SourceConfig]) -> Iterator[tuple[int, Document]]:
    """Every document with the number of its source."""
    return ((number, document) for number, source in enumerate(sources) for document in read_documents(source))


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


def token_without_row(token_id: int, vocab: int, token: str | None, source: str) -> DataError:
    """The error for a token id that the model's embedding has no row for."""
    return DataError(
        "the tokenizer does not belong to the model",
        expected=f"token ids below the model's vocab_size {vocab}",
        got=f"token id {token_id}" + (f" ({token!r})" if token is not None else "") + f" in {source}",
        hint="take tokenizer and weights from the same model, or drop the text with this token",
    )


def summarise(manifest: Facts) -> str:
    """One line for the terminal: documents and tokens of both splits, and what was left out."""
    train, held, dropped = manifest["splits"]["train"], manifest["splits"]["heldout"], manifest["dropped"]
    text = (
        f"Text: {train['documents']:,} documents, {train['tokens']:,} tokens to train on; "
        f"{held['documents']:,} documents, {held['tokens']:,} tokens held out"
    )
    return "; ".join([text, *_left_out(dropped)])


def _left_out(dropped: Mapping[str, int]) -> list[str]:
    notes = {"short": "with fewer than two tokens", "train_text_is_held_out": "whose text is held out"}
    return [f"{dropped[key]} documents {note} left out" for key, note in notes.items() if dropped[key]]
