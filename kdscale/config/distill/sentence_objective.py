"""The entry of `distill.objectives` for encoders that embed sentences."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from pydantic import Field

from kdscale.config.distill.objective import LayersRead, ModelPair, ObjectiveConfig, Term
from kdscale.config.distill.targets import FINAL, Needs

Pooling = Literal["mean", "cls"]


class SentenceEmbeddingsConfig(ObjectiveConfig):
    """Distance of sentence embeddings: of each from the teacher's, and of the cosines between those of a micro-batch.

    Sentences are the documents of the text (data.sentences cuts it into them), whole ones; each counts as often as it
    has tokens.
    """

    implementation = "kdscale.distill.objectives.sentence_embeddings:SentenceEmbeddings"
    terms = (
        Term("embedding_cosine", "cosine of sentence embeddings", headline=True, better="higher"),
        Term("similarity_error", "squared error of cosines between sentences", better="lower"),
    )
    reads_whole_documents = True
    matches_layers = True
    pools = True

    name: Literal["sentence_embeddings"] = "sentence_embeddings"
    # what makes one vector of a sentence: the mean over its positions, or its first one; auto: what the teacher's
    # 1_Pooling/config.json says, else the mean
    pooling: Literal["auto", "mean", "cls"] = "auto"
    # of the squared error of the cosines between sentences, beside 1 − the cosine to the teacher's embedding
    similarity_weight: Annotated[float, Field(ge=0.0, le=1e6)] = 10.0

    @property
    def needs(self) -> Needs:
        """What leaves the teacher."""
        return Needs(hidden_layers=(FINAL,))

    @property
    def student_layers(self) -> LayersRead:
        """What leaves the student."""
        return LayersRead(hidden=(FINAL,))

    def settled(self, models: ModelPair | None, steps: int) -> ObjectiveConfig:
        """Settles the pooling, too."""
        assert models is not None
        chosen = (models.pooling or "mean") if self.pooling == "auto" else self.pooling
        return super().settled(models, steps).model_copy(update={"pooling": chosen})

    def build(self, models: ModelPair | None) -> Any:
        """The sizes of both models decide about the projection."""
        return resolve_name(self.implementation)(self, models)

    @property
    def formula(self) -> str:
        """`1 − cosine + 10 · squared error of cosines, of sentence embeddings (mean)`."""
        return f"1 − cosine + {self.similarity_weight:g} · squared error of cosines, of sentence embeddings"
