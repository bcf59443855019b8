"""Tokenized text on disk: what every later stage reads.

    folder/manifest.json                      written last: without it the folder does not count
    folder/{train,heldout}/tokens.bin         all documents' token ids, one after another (uint16 or uint32)
                          /offsets.bin        (documents + 1) int64: where each document starts
                          /bytes.bin          (documents) int64: UTF-8 bytes of each document's text
                          /labels.bin         (documents) uint16: index into the manifest's list of source labels
                          /weights.bin        (documents) uint16: how often it is repeated per epoch
    folder/heldout/token_bytes.bin            (tokens) uint32: UTF-8 bytes of each token, for bits per byte

A document ends with what the tokenizer appends to a text, else with one end-of-text token (0 bytes of text). What the
tokenizer puts before a text (BOS) is in the manifest and added when sequences are packed. Held-out documents are
chosen by the hash of their text: a document stays on its side when sources are added, and equal texts never fall on
both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdscale.config.data import SourceConfig
from kdscale.data.sources import cut_text_files
from kdscale.data.store_builder import (
    SPLITS,
    DocumentFormat,
    StoreBuilder,
    describe_sources,
    read_store_manifest,
    summarise,
    survey_sources,
    token_without_row,
)
from kdscale.data.store_cache import StoreCache
from kdscale.data.tokenizing import NO_SPECIAL_TOKENS, BatchEncoder, SpecialTokens
from kdscale.errors import ConfigError, DataError
from kdscale.files import atomic_dir, write_json
from kdscale.runtime.progress import Reporter

_SHORTEST_CUT = 4  # tokens; the least that data.max_document_tokens may be
_MAX_WEIGHT = (1 << 16) - 1


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
    prefix_ids: tuple[int, ...] = ()  # what begins each document and each window that continues one

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.bytes_D.sum())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, without its prefix, (D,)."""
        return np.diff(self.offsets_D1)

    def document_tokens(self, i: int) -> np.ndarray:
        """Token ids of document `i` without its prefix; a document that was cut has its end in the last part only."""
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
        return cls(folder, read_store_manifest(folder))

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
            prefix_ids=tuple(self.manifest["prefix_ids"]),
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
        special: SpecialTokens = NO_SPECIAL_TOKENS,
        heldout_fraction: float = 0.05,
        heldout_sources: Sequence[SourceConfig] = (),
        vocab_size: int | None = None,
        max_document_tokens: int | None = None,
        processes: int | None = None,
        cache: StoreCache | None = None,
    ) -> TokenStore:
        """Read, split, tokenise and write; `folder` appears complete or not at all (an old one is replaced).

        `tokenizer` is a fast transformers tokenizer; `eos_id` ends each document (see tokenizing.document_end_id),
        unless `special` has a suffix. `vocab_size` is the model's: a text with an id beyond it is refused.
        `heldout_sources`, when given, replaces the fraction. Documents longer than `max_document_tokens` are cut into
        equal ones, each a document of its own. Documents without a token have nothing to predict; they are left out
        and counted. A store of the same text and settings is taken from `cache`, and a new one is put there.

        Raises DataError for unreadable sources, an empty split and ids beyond the vocabulary. Every local file is read
        and checked before anything is tokenised.
        """
        if max_document_tokens is not None and max_document_tokens < _SHORTEST_CUT:
            raise ConfigError(
                "data.max_document_tokens", expected=f"at least {_SHORTEST_CUT}", got=str(max_document_tokens)
            )
        for source in (*sources, *heldout_sources):
            if source.weight > _MAX_WEIGHT:
                raise ConfigError(f"weight of {source.path}", expected=f"at most {_MAX_WEIGHT}", got=str(source.weight))
        encoder = BatchEncoder.of(tokenizer)
        vocab = vocab_size if vocab_size is not None else max(tokenizer.get_vocab().values()) + 1
        form = DocumentFormat(eos_id, vocab, special, max_document_tokens)
        for token_id in (eos_id, *special.prefix, *special.suffix):
            if not 0 <= token_id < vocab:
                raise token_without_row(token_id, vocab, None, "the special tokens of the tokenizer")
        for notice in cut_text_files([*sources, *heldout_sources]):
            reporter.say(notice)
        description = describe_sources(sources, heldout_sources, heldout_fraction)
        key = cache.key(description, form, encoder.sha256) if cache is not None else None
        if cache is None or not cache.take(key, folder, description, reporter):
            survey = survey_sources(sources, heldout_sources, heldout_fraction)
            with atomic_dir(folder) as tmp, reporter.bar("Tokenizing", survey.text_bytes, "B") as bar:
                builder = StoreBuilder(tmp, encoder, form, processes, bar)
                builder.add_all(survey)
                write_json(tmp / "manifest.json", {**builder.finish(survey), **description})
            if cache is not None:
                cache.put(key, folder, reporter)
        store = cls.open(folder)
        reporter.say(summarise(store.manifest))
        return store
