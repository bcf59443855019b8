"""What a training job asks for and what it gets: the terms that memory and speed are computed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdscale.config.distill.lora import LoraConfig
from kdscale.config.distill.recompute import Recompute
from kdscale.config.distill.settings import TeacherDtype
from kdscale.families import load_family
from kdscale.families.linear_maps import adapted_maps
from kdscale.sizing.layer_losses import NO_LAYERS, LayerLosses
from kdscale.sizing.model_shape import ModelShape

TeacherPlacement = Literal["replicated", "partitioned", "offloaded", "served", "cached"]
Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Adapters:
    """What alone is trained beside frozen weights (distill.lora): parameters, and `ranks`, those of all adapters."""

    params: int
    ranks: int

    @classmethod
    def of(cls, lora: LoraConfig | None, student: Mapping[str, Any], where: str = "config.json") -> Adapters | None:
        """Of a student with this config.json; None without `lora`. Raises ConfigError for targets that it lacks."""
        if lora is None:
            return None
        maps = adapted_maps(load_family(dict(student), where), student, lora.targets).values()
        return cls(sum(one.parameters(lora.rank) for one in maps), lora.rank * len(maps))


@dataclass(frozen=True)
class Job:
    """What is trained, and on how many ranks. Text is packed, so every position has a label."""

    student: ModelShape
    teacher: ModelShape
    seq_len: int
    ranks: int
    ranks_per_node: int
    item_bytes: int = 2
    gradient_bytes: int = 4  # of a gradient while micro-batches and ranks add theirs: distill.zero.gradient_dtype
    top_k: int | None = 64  # tokens of a position's targets, of the top K or sampled; None: the whole vocabulary
    loss_buffers: int = 1  # [rows, V] arrays of the loss: LossOptions.buffers
    layer_losses: LayerLosses = NO_LAYERS
    validate_tokens: int = 0
    reduce_bucket: int = 500_000_000
    device: Device = "cuda"
    document_tokens: int | None = None  # of each document; None: one a row
    teacher_dtype: TeacherDtype = "auto"  # auto: the student's
    others: tuple[ModelShape, ...] = ()  # further teachers, placed as the first and asked after it
    average: bool = False  # one of them is the average of the student, kept in fp32 beside its working copy
    adapters: Adapters | None = None  # None: all of the student is trained
    reference: bool = False  # a frozen copy of the student as it began is asked about pairs of answers
    base: bool = False  # the teacher is the student without its adapters: it has no weights of its own

    @property
    def weights(self) -> int:
        """Parameters of the student, with adapters."""
        return self.student.params + (0 if self.adapters is None else self.adapters.params)

    @property
    def trained(self) -> int:
        """Parameters with a gradient, a master and moments."""
        return self.student.params if self.adapters is None else self.adapters.params

    @property
    def teachers(self) -> tuple[ModelShape, ...]:
        """All of them."""
        return (self.teacher, *self.others)

    @property
    def teacher_params(self) -> int:
        """Of all of them."""
        return sum(teacher.params for teacher in self.teachers)

    @property
    def teacher_bytes(self) -> int:
        """Of one of a teacher's weights; with linear maps in 8 bits, of the others."""
        return {"float32": 4, "bfloat16": 2}.get(self.teacher_dtype, self.item_bytes)

    @property
    def row(self) -> list[int]:
        """Tokens of the documents of one row; the last one is cut off."""
        size = min(self.document_tokens or self.seq_len, self.seq_len)
        whole, rest = divmod(self.seq_len, size)
        return [size] * whole + [rest] * (rest > 0)


@dataclass(frozen=True)
class Setting:
    """What a cluster plan chooses: how a step's work and memory are laid out over the ranks."""

    stage: int
    micro_batch: int
    accumulation: int
    recompute: Recompute
    placement: TeacherPlacement
    offload_optimizer: bool = False
    offload_parameters: bool = False
    hpz: int = 1
    tensor: int = 1  # ranks that share each layer
    sequence: int = 1  # ranks that share each sequence
    kept: int = 0  # parameters that stay gathered over the micro-batches of a step, at stage 3
    overlap: bool = False  # the teacher's forward of the next micro-batch beside the backward

    @property
    def runs_teacher(self) -> bool:
        """Whether the ranks run the teacher; it is elsewhere otherwise, or its targets are stored."""
        return self.placement not in ("served", "cached")

    def rows(self, job: Job) -> int:
        """Positions of a micro-batch that one rank has."""
        return self.micro_batch * job.seq_len // self.sequence


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by component at the fullest moment of a step, which `moment` names.

    `host` are the bytes of one rank in its host's memory.
    """

    parts: dict[str, float]
    moment: str
    host: float

    @property
    def total(self) -> float:
        """Bytes of one GPU."""
        return sum(self.parts.values())
