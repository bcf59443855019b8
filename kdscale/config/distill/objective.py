"""What every entry of `distill.objectives` has, and what it may know of the two models."""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from kdscale.config.distill.schedules import Between, Schedule
from kdscale.config.distill.targets import Needs
from kdscale.config.fields import Section

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Term:
    """A figure of an objective: a sum over a step, logged under `name` as the mean per token (or per sequence)."""

    name: str
    title: str  # as plots and messages call it
    unit: str = ""  # "fraction" is shown in per cent
    headline: bool = False  # part of the message after a validation
    exponential: Term | None = None  # logged at validations too: exp of the mean
    better: Literal["lower", "higher", ""] = ""  # of a distance to the teacher: which direction is nearer

    def text(self, mean: float) -> str:
        """The figure in words: `top-1 agreement 51.3 %`."""
        return f"{self.title} " + (f"{100 * mean:.1f} %" if self.unit == "fraction" else f"{mean:.2f}")


@dataclass(frozen=True)
class LayersRead:
    """Layers of one model, from 0, whose hidden states or attention are read.

    EMBEDDINGS: what enters layer 0. FINAL: what leaves the model.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelPair:
    """The sizes of teacher and student, and what pruning kept, where that is known.

    `widths`: of queries and of keys, in both models. `kept_layers`: the teacher's layer that each of the student's was.
    `basis_HG`: each channel of the student's hidden states as a direction in the teacher's, orthonormal rows.
    `pooling`: how the teacher makes one vector of a text, where its files say so.
    """

    teacher_layers: int
    student_layers: int
    teacher_hidden: int
    student_hidden: int
    widths: tuple[int, ...]
    kept_layers: tuple[int, ...] | None = None
    basis_HG: NDArray[Any] | None = None
    pooling: Literal["mean", "cls"] | None = None

    def matched_layers(self, pairs: int) -> dict[int, int]:
        """At most `pairs` of the student's layers, spread evenly and with the last, by the teacher's layer they match.

        A layer's match is the last one before the teacher's layer that the student's next layer was: a student's layer
        also does the work of dropped layers that followed it. Where that is not known, layers are matched by depth.
        """
        ends = [
            max(1, (layer + 1) * self.teacher_layers // self.student_layers) for layer in range(self.student_layers)
        ]
        if self.kept_layers is not None:
            ends = [*self.kept_layers[1:], self.teacher_layers]
        count = min(pairs, self.student_layers)
        chosen = [(number + 1) * self.student_layers // count - 1 for number in range(count)]
        return {layer: ends[layer] - 1 for layer in chosen}


LOSS = Term("loss", "loss", "nats")  # the weighted sum of all objectives; every run logs it


class ObjectiveConfig(Section):
    """One entry of distill.objectives: what all of them have.

    A new objective is a subclass with its settings, a row of OBJECTIVES, and a file with its implementation.
    """

    implementation: ClassVar[str]  # "module:class", called with the entry; imported when a training starts
    terms: ClassVar[tuple[Term, ...]]  # what it reports beside its loss, in this order
    count: ClassVar[Literal["tokens", "sequences", "pairs"]] = "tokens"  # its loss is a mean over these
    reads_head_shards: ClassVar[bool] = False  # works where tensor-parallel ranks share the student's head
    reads_whole_documents: ClassVar[bool] = False  # cannot do with a rank's own positions of a sequence
    matches_layers: ClassVar[bool] = False  # has to know the layers and sizes of both models (ModelPair)
    spans_widths: ClassVar[bool] = False  # is built with the models, whose widths decide about a projection
    pools: ClassVar[bool] = False  # makes one vector of a document: for encoders alone
    of_classes: ClassVar[bool] = False  # reads what an encoder tells of the class of a document
    only_own_text: ClassVar[bool] = False  # for what the student wrote itself (distill.on_policy) alone
    only_pairs: ClassVar[bool] = False  # for pairs of answers (distill.preferences) alone

    name: str
    # in the sum of all objectives
    weight: Annotated[float | Schedule, Between(0.0, 1e6, above=True)] = 1.0

    @property
    def needs_whole_sequences(self) -> str:
        """Why ranks cannot share sequences, in words; "" where they can."""
        if self.count != "tokens":  # no rank has all labels of one
            return "counts whole sequences"
        return "reads whole documents" if self.reads_whole_documents else ""

    @property
    def needs(self) -> Needs:
        """The parts of the teacher's targets that it reads."""
        return Needs()

    @property
    def reads_vocabulary(self) -> bool:
        """Whether it reads what the student's head says of tokens."""
        return not (self.matches_layers or self.of_classes)

    @property
    def reads_labels(self) -> bool:
        """Whether it learns from the text's own tokens, too."""
        return self.needs.nothing

    @property
    def adds_up(self) -> bool:
        """Whether the weighted sum of its losses to several teachers is its loss to their mixture, up to a constant."""
        return self.needs.nothing

    @property
    def needs_reference(self) -> bool:
        """Whether it reads what the student as it began gives each label."""
        return False

    @property
    def student_layers(self) -> LayersRead:
        """The student's layers that it reads."""
        return LayersRead()

    def settled(self, models: ModelPair | None, steps: int) -> ObjectiveConfig:
        """The entry for a run of `steps` steps with these models: schedules in steps, and what else depends on them."""
        return self.model_copy(
            update={name: value.in_steps(steps) for name, value in self if isinstance(value, Schedule)}
        )

    def build(self, models: ModelPair | None) -> Any:
        """Its implementation, from the settled entry. Raises ConfigError for models that it cannot match."""
        return resolve_name(self.implementation)(self, *([models] if self.spans_widths else []))

    def scheduled(self, step: int) -> dict[str, float]:
        """What of its settings follows a schedule, at optimiser step `step`, by the names of the log's columns."""
        return {f"{self.name}_{name}": value.at(step) for name, value in self if isinstance(value, Schedule)}

    @property
    def formula(self) -> str:
        """What is minimised, in one line, for the model card."""
        return self.name
