"""Targets that were computed once: no teacher is there, and the blocks of a step are read while the one before trains.

B sequences, S positions, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdscale.config.distill.targets import Needs
from kdscale.errors import ConfigError, DataError
from kdscale.runs.folder import TARGETS
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.store.binding import check_teacher
from kdscale.teacher.store.codecs import Assemble
from kdscale.teacher.store.format import tokens_checksum
from kdscale.teacher.store.reader import StoreReader
from kdscale.teacher.targets import Targets
from kdscale_kernels.types import IGNORE_INDEX

Arrays = dict[str, torch.Tensor]


class CachedTargets:
    """A source that reads a store; every rank reads the rows that it needs, whoever wrote them."""

    def __init__(self, store: StoreReader, assemble: Assemble, gives: Needs):
        self.model, self.gives = nn.Module(), gives  # no layers to search for a NaN
        self._store, self._assemble = store, assemble
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="targets")
        self._coming: dict[tuple[tuple[str, int], ...], Future[Arrays]] = {}

    def prefetch(self, batch: MicroBatch) -> None:
        """Begin to read the rows of a batch that is on the CPU."""
        if batch.rows and batch.sequences not in self._coming:
            self._coming[batch.sequences] = self._pool.submit(read_rows, self._store, batch)

    def targets(self, batch: MicroBatch) -> Targets:
        """The stored targets of the batch's rows, on their device.

        Raises DataError for sequences that are not stored or have other tokens, FileError for damaged ones.
        """
        if batch.rows == 0:
            return Targets(rows=0)
        coming = self._coming.pop(batch.sequences, None)
        arrays = read_rows(self._store, batch) if coming is None else coming.result()
        on_device = {name: array.to(batch.rows_N.device, non_blocking=True) for name, array in arrays.items()}
        return self._assemble(on_device, batch)

    def close(self) -> None:
        """Read nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def read_rows(store: StoreReader, batch: MicroBatch) -> Arrays:
    """The codec's arrays of the batch's rows, on the CPU. Raises as CachedTargets.targets does."""
    length, rows_N = batch.input_ids_BS.shape[1], batch.rows_N.cpu().numpy()
    ids_BS, positions_BS = (tensor.cpu().numpy() for tensor in (batch.input_ids_BS, batch.position_ids_BS))
    begins = np.searchsorted(rows_N, np.arange(len(batch.sequences) + 1) * length)
    parts: list[dict[str, np.ndarray]] = []
    for number, (split, sequence) in enumerate(batch.sequences):
        own_N = rows_N[begins[number] : begins[number + 1]] - number * length
        if own_N.size == 0:
            continue
        stored = store.sequence(split, sequence)
        if stored.tokens != tokens_checksum(ids_BS[number], positions_BS[number]):
            raise DataError(
                f"{store.folder}: {split} sequence {sequence:,}", expected="the tokens that its targets are of",
                got="others", hint="the text, its order or its packing changed since the store was written",
            )  # fmt: skip
        if not stored.kept_S[own_N].all():
            position = int(own_N[~stored.kept_S[own_N]][0])
            raise DataError(
                f"{store.folder} has no targets at position {position} of {split} sequence {sequence:,}",
                hint="write the store with targets.positions: all",
            )
        places_N = stored.kept_S.cumsum()[own_N] - 1
        whole = own_N.size == len(next(iter(stored.arrays.values())))
        parts.append(stored.arrays if whole else {name: array[places_N] for name, array in stored.arrays.items()})
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def choose_labels(store: StoreReader, labels_BS: torch.Tensor, sequences: Sequence[tuple[str, int]]) -> torch.Tensor:
    """The labels at positions that have targets, the others ignored."""
    kept_BS = torch.from_numpy(np.stack([store.kept(*key) for key in sequences]))
    return labels_BS.masked_fill(~kept_BS, IGNORE_INDEX)


def open_cached(request: SourceRequest) -> OpenedSource:
    """The store of this run. Raises ConfigError for one of another teacher, or that lacks what is needed."""
    settings = request.cfg.targets
    assert settings is not None, "the config has checked that there is a section"
    store = StoreReader(Path(settings.path) if settings.path else request.run_dir / TARGETS.path)
    header = store.header
    check_teacher(store.folder, header, request.teacher_dir)
    if missing := request.needs.missing_from(header.settings.gives):
        raise ConfigError(
            f"{store.folder}: its codec {header.settings.name} does not give what the objectives need",
            expected=missing, got=header.settings.gives.in_words(),
        )  # fmt: skip

    def start(vocab_size: int) -> CachedTargets:
        if vocab_size != header.vocab_size and not header.settings.gives.full:
            raise ConfigError(
                f"{store.folder}: the vocabulary", expected=f"the {vocab_size:,} tokens that teacher and student share",
                got=f"targets over {header.vocab_size:,}", hint="write the store with targets.codec: {name: hidden}",
            )  # fmt: skip
        return CachedTargets(store, store.codec.assembler(request, vocab_size), header.settings.gives)

    choose = (lambda text, keys: choose_labels(store, text.labels_BS, keys)) if header.share < 1.0 else None
    return OpenedSource(header.vocab_size, start, choose)
