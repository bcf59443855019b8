"""Which tokens of a batch are scored, and a model's hidden states there, in memory or in a file.

B sequences of a batch, S their length, N scored tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kdscale.data.batches import Batch
from kdscale.data.packing import IGNORED_LABEL
from kdscale.errors import DataError
from kdscale.files import explain_os_errors
from kdscale.models.attention import documents_apart
from kdscale.models.documents import Documents
from kdscale.models.head import final_hidden
from kdscale.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def scored_tokens(batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of all scored tokens and the number of the document piece that each belongs to, both int64 [N].

    A piece is a run of one document within a sequence (positions restart at 0): standard errors are over pieces.
    """
    labels, clusters, first = [], [], 0
    for batch in batches:
        starts_BS = batch.position_ids_BS == 0
        starts_BS[:, 0] = True
        cluster_BS = (starts_BS.flatten().cumsum(0) - 1).view_as(starts_BS) + first
        first = int(cluster_BS.max()) + 1
        valid_BS = batch.labels_BS != IGNORED_LABEL
        labels.append(batch.labels_BS[valid_BS].numpy())
        clusters.append(cluster_BS[valid_BS].numpy())
    if not labels or not sum(map(len, labels)):
        raise DataError(
            "the held-out split has nothing to score",
            expected="at least one document of two tokens",
            hint="raise data.heldout_fraction or name data.heldout_sources",
        )
    return np.concatenate(labels), np.concatenate(clusters)


def scored_hidden(model: PreTrainedModel, batch: Batch, device: torch.device) -> Tensor:
    """Final hidden states of the scored positions only, [N of this batch, H]."""
    documents = Documents.of(batch.position_ids_BS).to(device)
    with torch.inference_mode(), documents_apart(model):
        hidden_BSH = final_hidden(model, batch.input_ids_BS.to(device), batch.position_ids_BS.to(device), documents)
    return hidden_BSH[(batch.labels_BS != IGNORED_LABEL).to(device)]


@dataclass(frozen=True)
class ScoredHidden:
    """A file with a model's hidden states at the scored positions, and how many rows each batch has."""

    path: Path
    rows: list[int]

    @classmethod
    def write(
        cls, model: PreTrainedModel, batches: Sequence[Batch], path: Path, device: torch.device, bar: Bar
    ) -> ScoredHidden:
        """Run the model over all batches."""
        rows = []
        with explain_os_errors(path), path.open("wb") as stream:
            for batch in batches:
                hidden_NH = scored_hidden(model, batch, device).cpu().contiguous()
                hidden_NH.view(torch.uint8).numpy().tofile(stream)
                rows.append(len(hidden_NH))
                bar.advance(batch.input_ids_BS.numel(), "teacher")
        return cls(path, rows)

    def read(self, like_VH: Tensor) -> Iterator[Tensor]:
        """Hidden states [N, H] of one batch after another, with the dtype, device and H of the head's weight."""
        hidden, dtype = like_VH.shape[1], like_VH.dtype
        with self.path.open("rb") as stream:
            for rows in self.rows:
                raw = bytearray(stream.read(rows * hidden * dtype.itemsize))
                # An empty buffer cannot be a tensor's storage.
                flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                yield flat.view(rows, hidden).to(like_VH.device)
