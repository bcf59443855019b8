"""Distance of sentence embeddings, of each from the teacher's and among those of a micro-batch.

An embedding is the mean of a document's last hidden states, or its first one. With s and t the student's and the
teacher's, of length 1, a sentence i of n tokens adds

    n · (1 − cos(P sᵢ, tᵢ) + w · meanⱼ (sᵢ·sⱼ − tᵢ·tⱼ)²)

The second part is what searches and clusters read of embeddings, and needs no projection P, which is there where the
widths differ. Sources: Sentence-BERT's distillation (arXiv 2004.09813) and relational distillation (arXiv 1904.05068).

N rows (valid positions), M sentences, H and G student's and teacher's hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdscale.config.distill.encoder_objectives import SentenceEmbeddingsConfig
from kdscale.config.distill.objective import ModelPair
from kdscale.config.distill.targets import FINAL
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.hidden_states import projection_of
from kdscale.models.documents import Documents
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets


class SentenceEmbeddings(nn.Module):
    """The objective `sentence_embeddings`."""

    def __init__(self, settings: SentenceEmbeddingsConfig, models: ModelPair):
        super().__init__()
        self._settings = settings
        self.projection = projection_of(models)

    def forward(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(summed loss, sums of embedding_cosine and similarity_error); also without any row."""
        own_NH = student.layers_NH[FINAL]
        if batch.rows == 0:
            empty = own_NH if self.projection is None else self.projection(own_NH)
            return empty.sum().float(), own_NH.new_zeros(2).float()
        pool = Pool(batch, self._settings.pooling == "cls")
        own_MH, teacher_MG = pool(own_NH), pool(targets.hidden_NG[FINAL])
        projected_MG = own_MH if self.projection is None else self.projection(own_MH.to(self.projection.weight.dtype))
        cosine_M = F.cosine_similarity(projected_MG.float(), teacher_MG, dim=1)
        error_M = (_cosines(own_MH) - _cosines(teacher_MG)).square().mean(1)
        loss_M = 1.0 - cosine_M + self._settings.similarity_weight * error_M
        sums = torch.stack([(pool.tokens_M * part).sum() for part in (loss_M, cosine_M, error_M)])
        return sums[0], sums[1:].detach()


def _cosines(embedding_MH: Tensor) -> Tensor:
    unit_MH = F.normalize(embedding_MH, dim=1)
    return unit_MH @ unit_MH.T


class Pool:
    """Makes one vector, in fp32, of the rows of each document of a batch that has rows; `tokens_M`: how many."""

    def __init__(self, batch: MicroBatch, first: bool):
        documents = batch.documents or Documents.of(batch.position_ids_BS).to(batch.rows_N.device)
        of_row_N = torch.bucketize(batch.rows_N, documents.bounds_D1[1:].long(), right=True)
        _, self._of_row_N, tokens_M = of_row_N.unique_consecutive(return_inverse=True, return_counts=True)
        self.tokens_M, self._first = tokens_M.float(), first
        self._begins_M = tokens_M.cumsum(0) - tokens_M

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """[M, H], from the hidden states of the rows."""
        if self._first:
            return hidden_NH[self._begins_M].float()
        sums_MH = hidden_NH.new_zeros(len(self.tokens_M), hidden_NH.shape[1], dtype=torch.float32)
        return sums_MH.index_add(0, self._of_row_N, hidden_NH.float()) / self.tokens_M[:, None]
