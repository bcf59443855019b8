"""Entries of `distill.objectives` that compare layers of the student with layers of the teacher."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from kdscale.config.distill.objective import LayersRead, ModelPair, ObjectiveConfig, Term
from kdscale.config.distill.targets import EMBEDDINGS, Needs
from kdscale.config.fields import Few
from kdscale.errors import ConfigError


def _layer_map(value: Any) -> Any:
    """Layers by number: JSON has them as texts."""
    if not isinstance(value, dict):
        return value
    return {int(key) if isinstance(key, str) and key.removeprefix("-").isdecimal() else key: layer
            for key, layer in value.items()}  # fmt: skip


_RELATION_HEAD = 32  # channels of a relation head, at least, where their number is chosen
LayerNumber = Annotated[int, Field(ge=EMBEDDINGS, le=2**16)]


class LayerMatchConfig(ObjectiveConfig):
    """What objectives that compare layers have: which of the student's with which of the teacher's."""

    matches_layers = True
    lowest: ClassVar[int] = 0  # the first layer that can be compared

    # the student's layer: the teacher's, counted from 0; None: chosen when the models are known
    layers: Annotated[dict[LayerNumber, LayerNumber], BeforeValidator(_layer_map)] | None = None
    pairs: Few = 4  # how many layers are chosen

    @model_validator(mode="after")
    def _layers_are_some(self) -> LayerMatchConfig:
        if self.layers is not None and not self.layers:
            raise ValueError("layers: expected at least one pair, such as {5: 11}, or null")
        if below := [number for pair in (self.layers or {}).items() for number in pair if number < self.lowest]:
            raise ValueError(f"layers: expected layers from {self.lowest}, got {below[0]}")
        return self

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The teacher's layers that it reads; layer 0 until they are chosen."""
        return (0,) if self.layers is None else tuple(sorted(set(self.layers.values())))

    def settled(self, models: ModelPair | None, steps: int) -> ObjectiveConfig:
        """Chooses the layers, too. Raises ConfigError for a layer that a model does not have."""
        assert models is not None
        layers = models.matched_layers(self.pairs) if self.layers is None else self.layers
        for whose, numbers, count in (
            ("student", layers.keys(), models.student_layers), ("teacher", layers.values(), models.teacher_layers)
        ):  # fmt: skip
            if max(numbers) >= count:
                raise ConfigError(
                    f"distill.objectives: layers of {self.name}",
                    expected=f"layers of the {whose} from {self.lowest} to {count - 1}", got=str(max(numbers)),
                )  # fmt: skip
        return super().settled(models, steps).model_copy(update={"layers": layers})

    def _pairs_in_words(self) -> str:
        chosen = ", ".join(f"{student}: {teacher}" for student, teacher in (self.layers or {}).items())
        return f"layers {chosen}" if chosen else f"{self.pairs} layers of the student"


class HiddenStatesConfig(LayerMatchConfig):
    """Distance between the hidden states after matched layers, through a trained projection where the widths differ."""

    implementation = "kdscale.distill.objectives.hidden_states:HiddenStates"
    terms = (
        Term("hidden_error", "relative squared error of hidden states", better="lower"),
        Term("hidden_cosine", "cosine of hidden states", headline=True, better="higher"),
    )
    lowest = EMBEDDINGS  # what enters layer 0
    spans_widths = True

    name: Literal["hidden_states"] = "hidden_states"
    distance: Literal["mse", "cosine"] = "mse"

    @property
    def needs(self) -> Needs:
        """Hidden states of the teacher's layers."""
        return Needs(hidden_layers=self.teacher_layers)

    @property
    def student_layers(self) -> LayersRead:
        """The matched layers."""
        return LayersRead(hidden=tuple(sorted(self.layers or ())))

    @property
    def formula(self) -> str:
        """`mse of hidden states, 4 layers of the student`."""
        return f"{self.distance} of hidden states, {self._pairs_in_words()}"


class AttentionConfig(LayerMatchConfig):
    """KL of attention: relations among queries, keys and values (MiniLM), or the attention maps, of matched layers."""

    implementation = "kdscale.distill.objectives.attention:Attention"
    terms = (Term("attention_kl", "divergence of attention", "nats", better="lower"),)
    reads_whole_documents = True

    name: Literal["attention"] = "attention"
    # relations query-query, key-key, value-value; map: what each query gives to each key
    compare: tuple[Literal["query", "key", "value", "map"], ...] = Field(
        strict=False, default=("query", "key", "value"), min_length=1
    )
    # heads into which queries, keys and values are cut for their relations, in both models; None: by their widths
    relation_heads: Few | None = None
    pairs: Few = 1

    @property
    def needs(self) -> Needs:
        """What the attention of the teacher's layers reads."""
        return Needs(attention_layers=self.teacher_layers)

    @property
    def student_layers(self) -> LayersRead:
        """The matched layers."""
        return LayersRead(attention=tuple(sorted(self.layers or ())))

    def settled(self, models: ModelPair | None, steps: int) -> ObjectiveConfig:
        """Chooses the relation heads, too. Raises ConfigError for a number that does not divide the widths."""
        assert models is not None
        heads, divisor = self.relation_heads, math.gcd(*models.widths)
        if heads is None:
            most = max(1, min(models.widths) // _RELATION_HEAD)
            heads = max(count for count in range(1, most + 1) if divisor % count == 0)
        if divisor % heads:
            raise ConfigError(
                "distill.objectives: relation_heads of attention",
                expected=f"a divisor of {divisor}, which divides all queries, keys and values of both models",
                got=str(heads), hint="leave it out: it is then chosen",
            )  # fmt: skip
        return super().settled(models, steps).model_copy(update={"relation_heads": heads})

    @property
    def formula(self) -> str:
        """`KL of attention (query, key, value), layers 11: 23`."""
        return f"KL of attention ({', '.join(self.compare)}), {self._pairs_in_words()}"
