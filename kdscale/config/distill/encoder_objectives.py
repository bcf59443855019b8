"""The entries of `distill.objectives` for encoders that embed sentences, or tell the class of a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from kdscale.config.distill.masking import EncoderTask, MaskingConfig
from kdscale.config.distill.objective import LayersRead, ModelPair, ObjectiveConfig, Term
from kdscale.config.distill.schedules import Between, Schedule
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
    spans_widths = True
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

    @property
    def formula(self) -> str:
        """`1 − cosine + 10 · squared error of cosines, of sentence embeddings (mean)`."""
        return f"1 − cosine + {self.similarity_weight:g} · squared error of cosines, of sentence embeddings"


class ClassificationConfig(ObjectiveConfig):
    """α·CE + (1−α)·T²·KL of the teacher's classes; α is 0 for a text whose class is not known (`class_field`).

    Each document counts once: it is one of the "tokens" that a step counts.
    """

    implementation = "kdscale.distill.objectives.classification:Classification"
    terms = (
        Term("class_kl", "divergence of the classes", "nats", better="lower"),
        Term("class_agreement", "class as the teacher's", "fraction", headline=True, better="higher"),
    )
    reads_whole_documents = True
    of_classes = True

    name: Literal["classification"] = "classification"
    ce_weight: Annotated[float | Schedule, Between(0.0, 1.0)] = 0.0
    temperature: Annotated[float | Schedule, Between(1e-3, 1e3, above=True)] = 2.0

    @property
    def reads_labels(self) -> bool:
        """Where α is above 0, now or later in its schedule."""
        return self.ce_weight != 0.0

    @property
    def needs(self) -> Needs:
        """What the teacher gives to every class."""
        return Needs(full=True)

    @property
    def formula(self) -> str:
        """What is minimised, in one line."""
        weight = self.ce_weight if isinstance(self.ce_weight, Schedule) else f"{self.ce_weight:g}"
        return f"α·CE + (1−α)·T²·KL of the classes, α = {weight} where the class is known, T = {self.temperature:g}"


def task_of(objectives: Iterable[ObjectiveConfig], masking: MaskingConfig | None) -> EncoderTask | None:
    """What an encoder is to tell, by the objectives that it learns by."""
    return "classes" if any(entry.of_classes for entry in objectives) else masking
