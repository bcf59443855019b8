"""Tokenized text on disk: what every later stage reads. store_format.py has its files.

A document ends with what the tokenizer appends to a text, else with one end-of-text token (0 bytes of text). What the
tokenizer puts before a text (BOS) is in the manifest and added when sequences are packed. Held-out documents are
chosen by the hash of their text: a document stays on its side when sources are added, and equal texts never fall on
both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdscale.config.data import BlendConfig, DataConfig
from kdscale.data.readers.chat import chat_template
from kdscale.data.sources import cut_text_files
from kdscale.data.store_builder import (
    DocumentFormat,
    EncoderText,
    StoreBuilder,
    describe_sources,
    summarise,
    survey_sources,
    token_without_row,
)
from kdscale.data.store_cache import StoreCache
from kdscale.data.store_format import (
    CLASSES_FILE,
    LOSS_FILE,
    SPLITS,
    UNKNOWN_CLASS,
    name_in_blend,
    read_bits,
    read_store_manifest,
)
from kdscale.errors import ConfigError, DataError
from kdscale.files import atomic_dir, write_json
from kdscale.models.loading import NO_SPECIAL_TOKENS, SpecialTokens
from kdscale.models.tokenizer.tokenizing import BatchEncoder
from kdscale.runtime.progress import Reporter

_SHORTEST_CUT = 4  # tokens; the least that data.max_document_tokens may be


class Share(NamedTuple):
    """A name of a blend: its share of 1, and the numbers of the sources that it stands for."""

    name: str
    share: float
    sources: tuple[int, ...]


class EncoderTokens(NamedTuple):
    """What of the tokenizer those need who give text to an encoder; its documents are never cut by a window.

    `end_tokens`: how many tokens end each document. `mask_id`: stands for a hidden token; None: there is none.
    """

    end_tokens: int
    mask_id: int | None
    special_ids: tuple[int, ...]
    vocab: int


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
    sources_D: np.ndarray  # index into the config's list of sources
    weights_D: np.ndarray  # how often each document is repeated in an epoch
    tags: tuple[str, ...]  # the same in both splits
    tags_D: np.ndarray  # index into tags
    token_bytes_T: np.ndarray | None  # held-out only
    prefix_ids: tuple[int, ...] = ()  # what begins each document and each window that continues one
    loss_bits: np.ndarray | None = None  # a bit for each token: whether it is a label; None: all of them are
    blend: tuple[Share, ...] = ()  # empty: all documents are one stream
    encoder: EncoderTokens | None = None  # None: the text is for a decoder
    classes_D: np.ndarray | None = None  # the class of each document, or UNKNOWN_CLASS; None: none is known

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.bytes_D.sum())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, without its prefix, (D,)."""
        return np.diff(self.offsets_D1)

    def documents_of(self, share: Share) -> np.ndarray:
        """Numbers of the documents that a share of the blend stands for, ascending."""
        return np.flatnonzero(np.isin(self.sources_D, share.sources))

    def document_tokens(self, i: int) -> np.ndarray:
        """Token ids of document `i` without its prefix; a document that was cut has its end in the last part only."""
        return self.tokens_T[self.offsets_D1[i] : self.offsets_D1[i + 1]]

    def document_is_label(self, i: int) -> np.ndarray | None:
        """Which tokens of document `i` are labels, (tokens,) bool; None: all of them."""
        if self.loss_bits is None:
            return None
        return read_bits(self.loss_bits, int(self.offsets_D1[i]), int(self.offsets_D1[i + 1]))

    def class_of(self, i: int) -> int:
        """The class of document `i`, or UNKNOWN_CLASS."""
        return UNKNOWN_CLASS if self.classes_D is None else int(self.classes_D[i])

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
        return cls(folder, read_store_manifest(folder))

    def split(self, name: str) -> TokenSplit:
        """The split `train` or `heldout`, memory-mapped."""
        if name not in SPLITS:
            raise ConfigError(f"split {name!r}", expected=" or ".join(SPLITS))
        facts, folder = self.manifest["splits"][name], self.folder / name
        labels_D = np.fromfile(folder / "labels.bin", dtype=np.uint16)
        sources_D = np.fromfile(folder / "sources.bin", dtype=np.uint16)
        has_loss_bits, has_classes = (f"{name}/{f}" in self.manifest["files"] for f in (LOSS_FILE, CLASSES_FILE))
        if max(sources_D, default=0) >= len(self._sources(name)):
            raise DataError(f"{folder / 'sources.bin'} is damaged", hint="delete the store and build it again")
        return TokenSplit(
            documents=facts["documents"],
            tokens=facts["tokens"],
            eos_id=self.manifest["eos_id"],
            source_labels=tuple(self.manifest["source_labels"]),
            tokens_T=np.memmap(folder / "tokens.bin", dtype=self.manifest["dtype"], mode="r"),
            offsets_D1=np.fromfile(folder / "offsets.bin", dtype=np.int64),
            bytes_D=np.fromfile(folder / "bytes.bin", dtype=np.int64),
            labels_D=labels_D,
            sources_D=sources_D,
            weights_D=self._weights_of(name, sources_D),
            tags=self.tags,
            tags_D=self._tags_of(name, sources_D, labels_D),
            token_bytes_T=np.memmap(folder / "token_bytes.bin", dtype=np.uint32, mode="r")
            if name == "heldout"
            else None,
            prefix_ids=tuple(self.manifest["prefix_ids"]),
            loss_bits=np.memmap(folder / LOSS_FILE, dtype=np.uint8, mode="r") if has_loss_bits else None,
            blend=self._blend() if name == "train" else (),
            encoder=self._encoder(),
            classes_D=np.fromfile(folder / CLASSES_FILE, dtype=np.int32) if has_classes else None,
        )

    def _encoder(self) -> EncoderTokens | None:
        """What an encoder's text needs of the tokenizer; None in a decoder's store."""
        facts = self.manifest.get("encoder")
        if facts is None:
            return None
        ends, vocab = len(self.manifest["end_ids"]), int(self.manifest["vocab_size"])
        return EncoderTokens(ends, facts["mask_id"], tuple(facts["special_ids"]), vocab)

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that a document can have: the labels of the text, then what sources have as `tag`."""
        given = [source["tag"] for source in (*self._sources("train"), *self._sources("heldout"))]
        return tuple(dict.fromkeys([*self.manifest["source_labels"], *(tag for tag in given if tag is not None)]))

    @property
    def tags_in_use(self) -> tuple[str, ...]:
        """The tags that some document has, in the order of `tags`."""
        used = np.unique(np.concatenate([self.split(name).tags_D for name in SPLITS]))
        return tuple(self.tags[index] for index in used)

    def _sources(self, split: str) -> list[dict[str, Any]]:
        """The sources that a split's documents number; the held-out text may have its own."""
        sources: list[dict[str, Any]] = self.manifest["sources"]
        return self.manifest.get("heldout_sources") or sources if split == "heldout" else sources

    def _blend(self) -> tuple[Share, ...]:
        """The blend of the config that the store was built with."""
        if self.manifest.get("blend") is None:
            return ()
        names = [name_in_blend(source) for source in self.manifest["sources"]]
        return tuple(
            Share(name, share, tuple(i for i, other in enumerate(names) if other == name))
            for name, share in BlendConfig(**self.manifest["blend"]).shares().items()
        )

    def _weights_of(self, split: str, sources_D: np.ndarray) -> np.ndarray:
        weights = [source["weight"] if split == "train" else 1 for source in self._sources(split)]
        return np.asarray(weights, np.uint16)[sources_D]

    def _tags_of(self, split: str, sources_D: np.ndarray, labels_D: np.ndarray) -> np.ndarray:
        number = {tag: index for index, tag in enumerate(self.tags)}
        own = [-1 if source["tag"] is None else number[source["tag"]] for source in self._sources(split)]
        of_source_D = np.asarray(own, np.int64)[sources_D]
        return np.where(of_source_D < 0, labels_D, of_source_D)

    @classmethod
    def build(
        cls,
        folder: Path,
        data: DataConfig,
        tokenizer: Any,
        *,
        eos_id: int,
        reporter: Reporter,
        special: SpecialTokens = NO_SPECIAL_TOKENS,
        vocab_size: int | None = None,
        cache: StoreCache | None = None,
        encoder: bool = False,
        classes: Sequence[str] = (),
    ) -> TokenStore:
        """Read, split, tokenise and write; `folder` appears complete or not at all (an old one is replaced).

        `tokenizer` is a fast transformers tokenizer; `eos_id` ends each document (see tokenizing.document_end_id),
        unless `special` has a suffix. `vocab_size` is the model's: a text with an id beyond it is refused. Documents
        without a token have nothing to predict; they are left out and counted. A store of the same text and settings
        is taken from `cache`, and a new one is put there. For an `encoder` (`eos_id`: its padding) every part of a
        document that is cut has both ends. `classes`: the names of those that it tells, by their numbers.

        Raises DataError for unreadable sources, an empty split and ids beyond the vocabulary, ConfigError for settings
        that the tokenizer or the text rules out. Every local file is read and checked before anything is tokenised.
        """
        if data.max_document_tokens is not None and data.max_document_tokens < _SHORTEST_CUT:
            raise ConfigError(
                "data.max_document_tokens", expected=f"at least {_SHORTEST_CUT}", got=str(data.max_document_tokens)
            )
        batch_encoder, chat = BatchEncoder.of(tokenizer), chat_template(data, tokenizer)
        vocab = vocab_size if vocab_size is not None else max(tokenizer.get_vocab().values()) + 1
        markup_ids = tuple(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        form = DocumentFormat(
            eos_id, vocab, special, data.max_document_tokens, markup_ids,
            EncoderText(tokenizer.mask_token_id, tuple(tokenizer.all_special_ids)) if encoder else None,
            tuple(classes),
        )  # fmt: skip
        for token_id in (eos_id, *special.prefix, *special.suffix):
            if not 0 <= token_id < vocab:
                raise token_without_row(token_id, vocab, None, "the special tokens of the tokenizer")
        for notice in cut_text_files([*data.sources, *data.heldout_sources]):
            reporter.say(notice)
        description = describe_sources(data, chat)
        key = cache.key(description, form, batch_encoder.sha256) if cache is not None else None
        if cache is None or not cache.take(key, folder, description, reporter):
            survey = survey_sources(data, chat)
            with atomic_dir(folder) as tmp, reporter.bar("Tokenizing", survey.text_bytes, "B") as bar:
                builder = StoreBuilder(tmp, batch_encoder, form, survey, bar)
                builder.add_all()
                write_json(tmp / "manifest.json", {**builder.finish(), **description})
            if chat.left_out_tools:
                reporter.say("  note: conversations call tools: the calls and what they returned are left out")
            if cache is not None:
                cache.put(key, folder, reporter)
        store = cls.open(folder)
        reporter.say(summarise(store.manifest))
        return store
