"""Which positions of the training sequences are worth a target: those where the pruned student knows least.

SE-KD (arXiv 2602.01395) distils the positions of the highest student's entropy alone. The student is asked once, when
the store is written. A position that is not chosen takes no part in the training; held-out sequences keep all.

N rows, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdscale.models.head import OutputHead, head_of
from kdscale.models.loading import load_model
from kdscale.models.sequence_parallel import SequenceSlice
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.store.format import TRAIN
from kdscale_kernels.fused.products import chunk_bytes_for, row_chunks


class EntropyChoice:
    """Keeps the `share` of each training sequence's rows at which the model in `student_dir` has the most entropy."""

    def __init__(self, student_dir: Path, share: float, *, dtype: torch.dtype, device: torch.device, trust: bool):
        self._model: Any = load_model(student_dir, dtype=dtype, device=device, trust_remote_code=trust)
        self._share, self._whole = share, SequenceSlice()
        self._whole.prepare(self._model)

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> MicroBatch:
        """The batch with the rows that are kept. Of equal entropies the earlier position counts as the higher one."""
        hidden_BSH, rows_N = self._whole.hidden(
            self._model, batch.input_ids_BS, batch.position_ids_BS, batch.rows_N, batch.documents
        )
        hidden_NH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1]).index_select(0, rows_N)
        entropy_N = entropies(hidden_NH, head_of(self._model))
        kept_N = torch.ones_like(rows_N, dtype=torch.bool)
        sequence_N = rows_N // batch.input_ids_BS.shape[1]
        for number, (split, _) in enumerate(batch.sequences):
            own = (sequence_N == number).nonzero()[:, 0]
            if split == TRAIN:
                order = entropy_N[own].sort(descending=True, stable=True).indices
                kept_N[own[order[math.ceil(self._share * len(own)) :]]] = False
        tags_N = None if batch.tags_N is None else batch.tags_N[kept_N.cpu()]
        return replace(batch, rows_N=batch.rows_N[kept_N], labels_N=batch.labels_N[kept_N], tags_N=tags_N)


def entropies(hidden_NH: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Entropy [N] (nats, fp32) of the distribution that the head makes of each row."""
    out_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
    for chunk in row_chunks(len(hidden_NH), head.vocab, chunk_bytes_for(None, hidden_NH.device), buffers=3):
        logp_CV = head.logits(hidden_NH[chunk]).log_softmax(1)
        out_N[chunk] = -(logp_CV.exp() * logp_CV).sum(1)
    return out_N
