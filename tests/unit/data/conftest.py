"""Fixtures for the data tests: a tokenizer object, files of documents, and splits made without any tokenizer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.data.token_store import Share, TokenSplit, TokenStore
from kdscale.runtime.progress import Reporter


@pytest.fixture(scope="session")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def reporter() -> Reporter:
    return Reporter(quiet=True)


@pytest.fixture
def build(tmp_path: Path, tokenizer: Any, reporter: Reporter) -> Callable[..., TokenStore]:
    """Builds a store of these files in tmp_path / folder; `options` are those of DataConfig and of TokenStore.build."""

    def run(*paths: Path, folder: str = "store", heldout: Sequence[Path] = (), **options: Any) -> TokenStore:
        sources, heldout_sources = (tuple(SourceConfig(path=str(path)) for path in side) for side in (paths, heldout))
        options = {
            "sources": sources, "heldout_sources": heldout_sources, "heldout_fraction": 0.2, "eos_id": 0, **options
        }  # fmt: skip
        data = DataConfig(**{name: options.pop(name) for name in set(options) & set(DataConfig.model_fields)})
        return TokenStore.build(tmp_path / folder, data, tokenizer, reporter=reporter, **options)

    return run


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, texts: Sequence[str], **extra: str) -> Path:
        raw = "".join(json.dumps({"text": text, **extra}) + "\n" for text in texts).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
        return path

    return write


@pytest.fixture(scope="session")
def make_split() -> Callable[..., TokenSplit]:
    """A split whose token values are all different: token k of document d is 1000·(d + 1) + k."""

    def make(
        lengths: Sequence[int],
        weights: Sequence[int] | None = None,
        labels: Sequence[int] = (),
        prefix_ids: tuple[int, ...] = (),
        is_label: Sequence[bool] | None = None,
        shares: dict[int, float] | None = None,
    ) -> TokenSplit:
        tokens = [np.arange(n) + 1000 * (d + 1) for d, n in enumerate(lengths)]
        flat = np.concatenate(tokens).astype(np.uint32)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        labels_D = np.asarray(labels or [0] * len(lengths), np.uint16)
        return TokenSplit(
            documents=len(lengths),
            tokens=int(flat.size),
            eos_id=7,
            source_labels=tuple(f"source{i}" for i in range(int(labels_D.max()) + 1)),
            tokens_T=flat,
            offsets_D1=offsets,
            bytes_D=np.asarray(lengths),
            labels_D=labels_D,
            sources_D=labels_D,
            tags=tuple(f"tag{i}" for i in range(int(labels_D.max()) + 1)),
            tags_D=labels_D.astype(np.int64),
            weights_D=np.asarray(weights or [1] * len(lengths), np.uint16),
            token_bytes_T=(flat % 5).astype(np.uint32),
            prefix_ids=prefix_ids,
            loss_bits=None if is_label is None else np.packbits(np.asarray(is_label, bool)),
            blend=tuple(Share(f"source{i}", share, (i,)) for i, share in (shares or {}).items()),
        )

    return make
