"""Writes a token store: reads every source once to check it, then tokenises document after document into the splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.data.deduplicate import SeenTexts
from kdscale.data.encoder_processes import EncoderProcesses, usable_cores
from kdscale.data.leaks import Text, find_leaks, in_words
from kdscale.data.readers.chat import ChatTemplate
from kdscale.data.sentences import sentences
from kdscale.data.sources import Document, describe_source, is_local, read_documents
from kdscale.data.store_format import SPLITS, STORE_VERSION, UNKNOWN_CLASS, Facts, SplitWriter, keep_documents
from kdscale.errors import DataError
from kdscale.files import sha256_json
from kdscale.models.loading import NO_SPECIAL_TOKENS, SpecialTokens
from kdscale.models.tokenizer.tokenizing import BatchEncoder, EncodedText, tokens_of_spans
from kdscale.runtime.progress import Bar

_BATCH_DOCUMENTS, _BATCH_CHARS = 256, 250_000  # whichever comes first; the library takes 140 bytes a character
_MANY_BYTES = 32 << 20  # of text, from which on starting processes pays
_OTHER, _MAX_LABELS = "other", 1 << 16


@dataclass(frozen=True)
class EncoderText:
    """What the manifest of an encoder's store has beside: the mask token (None: there is none), all special tokens."""

    mask_id: int | None
    special_ids: tuple[int, ...]


@dataclass(frozen=True)
class DocumentFormat:
    """How a document becomes tokens."""

    eos_id: int  # ends each document, where `special` has no suffix
    vocab_size: int  # of the model; a token id from here on has no row in its embedding
    special: SpecialTokens = NO_SPECIAL_TOKENS
    max_tokens: int | None = None  # a longer document is cut into equal ones
    markup_ids: tuple[int, ...] = ()  # special tokens: in a chat they stand for no text
    encoder: EncoderText | None = None  # None: for a decoder
    classes: tuple[str, ...] = ()  # of the teacher, by their numbers; empty: it tells none

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What is appended to each document's tokens."""
        return self.special.suffix or (self.eos_id,)


@dataclass(frozen=True)
class Survey:
    """What one reading of every local source, without tokenising, found out."""

    data: DataConfig
    chat: ChatTemplate
    heldout_hashes: frozenset[bytes]  # of the texts of heldout_sources
    text_bytes: int

    def in_heldout(self, text_hash: bytes) -> bool:
        """Whether a document of `sources` is held out by the fraction: a pure function of its text."""
        fraction = 0.0 if self.data.heldout_sources else self.data.heldout_fraction
        return int.from_bytes(text_hash[:8], "big") < fraction * 2.0**64

    def documents(self, sources: Sequence[SourceConfig]) -> Iterator[tuple[int, Document]]:
        """Every document with the number of its source."""
        return ((i, document) for i, source in enumerate(sources) for document in self.parts(source))

    def parts(self, source: SourceConfig) -> Iterator[Document]:
        """The documents of one source, or with data.sentences their sentences."""
        for document in read_documents(source, self.chat):
            yield from sentences_of(document) if self.data.sentences else (document,)


def describe_sources(data: DataConfig, chat: ChatTemplate) -> Facts:
    """What identifies the text and how it is split, for the manifest; reads every local file for its digest."""
    facts: Facts = {
        **({"sentences": True} if data.sentences else {}),
        "sources": [describe_source(source) for source in data.sources],
        "deduplicate": data.deduplicate,
        "blend": None if data.blend is None else data.blend.model_dump(),  # a shared store may be of another blend
    }
    if data.leaks != "off":
        facts["leak_sources"] = [describe_source(source) for source in data.leak_sources]
        facts["leaks_looked_for"] = [data.leaks, data.leak_tokens]
    if data.has_chats:
        facts["chat_template_sha256"] = sha256_json(chat.text)
    if data.heldout_sources:
        return {**facts, "heldout_sources": [describe_source(source) for source in data.heldout_sources]}
    return {**facts, "heldout_fraction": data.heldout_fraction}


def survey_sources(data: DataConfig, chat: ChatTemplate) -> Survey:
    """Read every local source to its end, so that every bad line is reported before anything is tokenised."""
    size, hashes = 0, set()
    for source in data.heldout_sources:
        for document in read_documents(source, chat):
            hashes.add(_hash(document))
            size += document.size if is_local(source) else 0
    for source in data.sources:
        if is_local(source):
            size += sum(document.size for document in read_documents(source, chat))
    if data.leaks != "off":
        for source in data.leak_sources:
            for _ in read_documents(source, chat):
                pass
    return Survey(data, chat, frozenset(hashes), size)


class StoreBuilder:
    """Tokenises batch after batch into the two splits' files."""

    def __init__(self, folder: Path, encoder: BatchEncoder, form: DocumentFormat, survey: Survey, bar: Bar):
        self._folder, self._encoder, self._format = folder, encoder, form
        self._survey, self._bar = survey, bar
        self._dtype = "uint16" if form.vocab_size <= 1 << 16 else "uint32"
        self._splits = {name: SplitWriter(folder / name, self._dtype, keep_bytes=name == "heldout") for name in SPLITS}
        self._labels: dict[str, int] = {}
        self._dropped: Counter[str] = Counter(short=0, train_text_is_held_out=0, duplicate=0)
        self._seen = SeenTexts() if survey.data.deduplicate else None
        self._left = _token_budgets(survey.data)

    def add_all(self) -> None:
        """Tokenise all documents, each into its split."""
        data = self._survey.data
        processes = data.processes or (usable_cores() if self._survey.text_bytes >= _MANY_BYTES else 1)
        with EncoderProcesses(self._encoder, processes) as encoders:
            self._add(encoders, self._survey.documents(data.heldout_sources), lambda *_: "heldout")
            self._add(encoders, self._wanted_documents(), self._split_of)

    def finish(self) -> Facts:
        """Close the files; returns the manifest. Raises DataError for a split without documents."""
        data = self._survey.data
        splits = {name: writer.close() for name, writer in self._splits.items()}
        for name, facts in splits.items():
            if not facts["documents"]:
                in_other_split = sum(split["documents"] for split in splits.values())
                read = ", ".join(source.path for source in (*data.sources, *data.heldout_sources))
                raise DataError(
                    f"no document of {read} is left for the {name} split",
                    expected="at least one document of two tokens or more in each split",
                    got="; ".join([f"{in_other_split} in the other split", *_left_out(self._dropped)]),
                    hint="give more documents (a .txt file below 128 KiB is one document), set data.heldout_sources, "
                    "or change data.heldout_fraction",
                )
        leaks = {} if data.leaks == "off" else {"leaks": self._look_for_leaks(splits)}
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
            **leaks,
            **({} if self._format.encoder is None else {"encoder": asdict(self._format.encoder)}),
            "files": {item.relative_to(self._folder).as_posix(): item.stat().st_size for item in files},
        }

    def _look_for_leaks(self, splits: dict[str, dict[str, int]]) -> Facts:
        """What of the evaluation text is in the training text, from which data.leaks: drop takes it.

        Raises DataError where the config wants none, or none would be left.
        """
        data = self._survey.data
        train, heldout = (self._read(name) for name in SPLITS)
        leaks = find_leaks(train, [heldout, *self._leak_texts()], data.leak_tokens)
        facts = leaks.facts(train, data.leak_tokens, self._encoder.text_of)
        kept = np.setdiff1d(np.arange(splits["train"]["documents"]), leaks.documents)
        if leaks.documents.size and (data.leaks == "fail" or not kept.size):
            raise DataError(
                "the training text has evaluation text in it",
                expected=f"no run of {data.leak_tokens} tokens that both have",
                got="\n".join(in_words(facts)).strip(),
                hint="give other text, data.leaks: drop, or longer runs in data.leak_tokens",
            )
        if leaks.documents.size and data.leaks == "drop":
            splits["train"] = keep_documents(self._folder / "train", self._dtype, kept)
            facts["dropped"] = True
        return facts

    def _read(self, split: str) -> Text:
        folder = self._folder / split
        return Text(
            np.memmap(folder / "tokens.bin", self._dtype, mode="r"), np.fromfile(folder / "offsets.bin", np.int64)
        )

    def _leak_texts(self) -> Iterator[Text]:
        """The documents of leak_sources, tokenised."""
        for batch in _batches(self._survey.documents(self._survey.data.leak_sources)):
            encoded = self._encoder.encode([document.text for _, document in batch])
            for (_, document), text in zip(batch, encoded, strict=True):
                ids = text.ids if document.ids is None else document.ids
                yield Text(ids, np.asarray([0, ids.size]))

    def _wanted_documents(self) -> Iterator[tuple[int, Document]]:
        """The documents of all sources; a source whose share of the blend is tokenised is not read any further."""
        for number, source in enumerate(self._survey.data.sources):
            for document in self._survey.parts(source):
                if self._is_full(source):
                    break
                yield number, document

    def _is_full(self, source: SourceConfig) -> bool:
        return self._left.get(source.name, 1.0) <= 0.0

    def _split_of(self, number: int, document: Document) -> str | None:
        """The split of a document of source `number`; None for one that is left out.

        A worker that tokenises may have read on after a source was full: what it read does not count.
        """
        if self._is_full(self._survey.data.sources[number]):
            return None
        digest = _hash(document)
        if digest in self._survey.heldout_hashes:
            self._dropped["train_text_is_held_out"] += 1
            return None
        return "heldout" if self._survey.in_heldout(digest) else "train"

    def _add(
        self,
        encoders: EncoderProcesses,
        documents: Iterable[tuple[int, Document]],
        split_of: Callable[[int, Document], str | None],
    ) -> None:
        for batch, encoded in encoders.encode(_batches(documents), lambda batch: [item.text for _, item in batch]):
            for (source, document), text in zip(batch, encoded, strict=True):
                split = split_of(source, document)
                if split is not None and self._seen is not None and not self._seen.add(document):
                    self._dropped["duplicate"] += 1
                elif split is not None:
                    self._add_document(document, text, split, source)
            self._bar.advance(sum(document.size for _, document in batch))

    def _add_document(self, document: Document, text: EncodedText, split: str, source: int) -> None:
        if document.ids is not None:
            text = EncodedText(document.ids, self._encoder.bytes_of(document.ids))
        if not text.ids.size:
            self._dropped["short"] += 1
            return
        if (worst := int(text.ids.max())) >= self._format.vocab_size:
            raise token_without_row(worst, self._format.vocab_size, self._encoder.token(worst), document.source)
        tokens_3T, label = document_tokens(document, text, self._format), self._label(document.source)
        class_ = class_number(document, self._format.classes)
        for cut in _cut(tokens_3T, self._format):
            self._splits[split].add(cut, label, source, class_)
        if split == "train" and self._left:
            self._left[self._survey.data.sources[source].name] -= tokens_3T.shape[1]

    def _label(self, source: str) -> int:
        """The number of a source. Those that come after the 65,535th share one, "other": a number has 16 bits."""
        if source not in self._labels and len(self._labels) >= _MAX_LABELS - 1:
            source = _OTHER
        return self._labels.setdefault(source, len(self._labels))


def class_number(document: Document, classes: Sequence[str]) -> int:
    """The class that the document says it is of, or UNKNOWN_CLASS. Raises DataError for one that there is not."""
    value = document.class_
    if value is None:
        return UNKNOWN_CLASS
    number = classes.index(value) if value in classes else value
    if not isinstance(number, int) or not 0 <= number < len(classes):
        raise DataError(
            f"document {document.index} of {document.source} is of the class {value!r}"[:200],
            expected=f"a number below {len(classes)}, or one of {', '.join(classes[:20])}" if classes
            else "no class: the teacher tells none",
            hint="see id2label in the teacher's config.json and class_field of the source",
        )  # fmt: skip
    return number


def document_tokens(document: Document, text: EncodedText, form: DocumentFormat) -> np.ndarray:
    """A document's tokens as the store has them, int64 (3, T): id, UTF-8 bytes, and 1 where the token is a label.

    What a chat template or Megatron has put there already, what ends a document is not put there again, and what begins
    one is left out, as packing adds it. The end of a chat is a label only where the last answer reaches it. Its special
    tokens count no bytes.
    """
    end_ids, size = form.end_ids, text.ids.size
    if document.answers is None:
        tokens_3T = np.stack([text.ids, text.bytes, np.ones(size, np.int64)])
        learned = True
    else:
        sizes = np.where(np.isin(text.ids, form.markup_ids), 0, text.bytes)
        tokens_3T = np.stack([text.ids, sizes, tokens_of_spans(document.text, text.bytes, document.answers)])
        learned = document.answers[-1][1] == len(document.text)
    if document.brings_own_ends:
        if (prefix := len(form.special.prefix)) and tuple(text.ids[:prefix]) == form.special.prefix:
            tokens_3T = tokens_3T[:, prefix:]
        if tuple(text.ids[-len(end_ids) :]) == end_ids:
            learned = bool(tokens_3T[2, -1])
            tokens_3T = tokens_3T[:, : -len(end_ids)]
    return np.append(tokens_3T, [end_ids, [0] * len(end_ids), [learned] * len(end_ids)], axis=1)


def _cut(tokens_3T: np.ndarray, form: DocumentFormat) -> list[np.ndarray]:
    """A document in equal parts of at most `max_tokens`; for an encoder each of them has the document's end."""
    if form.max_tokens is None:
        return [tokens_3T]
    ends = len(form.end_ids) if form.encoder is not None else 0
    text_3T = tokens_3T[:, : tokens_3T.shape[1] - ends]
    parts = np.array_split(text_3T, -(-text_3T.shape[1] // (form.max_tokens - ends)), axis=1)
    return [np.append(part, tokens_3T[:, -ends:], axis=1) for part in parts] if ends else parts


def sentences_of(document: Document) -> Iterator[Document]:
    """The sentences of a document, which stay on its side; one that is no plain text as it is."""
    if document.brings_own_ends:
        yield document
        return
    for sentence in sentences(document.text):
        yield replace(document, text=sentence, part_of=document.content)


def _token_budgets(data: DataConfig) -> dict[str, float]:
    """How many training tokens are tokenised of what each name of a blend stands for; empty where all are."""
    if data.blend is None or data.blend.tokens is None:
        return {}
    return {name: share * data.blend.tokens for name, share in data.blend.shares().items()}


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


def _hash(document: Document) -> bytes:
    return hashlib.sha256(document.content if document.part_of is None else document.part_of).digest()


def token_without_row(token_id: int, vocab: int, token: str | None, source: str) -> DataError:
    """The error for a token id that the model's embedding has no row for."""
    return DataError(
        "the tokenizer does not belong to the model",
        expected=f"token ids below the model's vocab_size {vocab}",
        got=f"token id {token_id}" + (f" ({token!r})" if token is not None else "") + f" in {source}",
        hint="take tokenizer and weights from the same model, or drop the text with this token",
    )


def summarise(manifest: Facts) -> str:
    """For the terminal: documents and tokens of both splits, what was left out, and what both have."""
    train, held, dropped = manifest["splits"]["train"], manifest["splits"]["heldout"], manifest["dropped"]
    counts = (
        f"Text: {train['documents']:,} documents, {train['tokens']:,} tokens to train on; "
        f"{held['documents']:,} documents, {held['tokens']:,} tokens held out"
    )
    leaks = in_words(manifest["leaks"]) if manifest.get("leaks") else []
    return "\n".join(["; ".join([counts, *_left_out(dropped)]), *leaks])


def _left_out(dropped: Mapping[str, int]) -> list[str]:
    notes = {
        "short": "with fewer than two tokens",
        "train_text_is_held_out": "whose text is held out",
        "duplicate": "that came before",
    }
    return [f"{dropped[key]} documents {note} left out" for key, note in notes.items() if dropped[key]]
