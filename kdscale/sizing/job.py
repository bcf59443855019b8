"""What a job asks for and what it gets: the terms that memory and speed are computed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdscale.sizing.model_shape import ModelShape

TeacherPlacement = Literal["replicated", "partitioned", "offloaded", "served"]


Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Job:
    """What is trained and on how many ranks; `label_share`: positions that have a label, 1 in packed text."""

    student: ModelShape
    teacher: ModelShape
    seq_len: int
    ranks: int
    ranks_per_node: int
    item_bytes: int = 2
    top_k: int | None = 64  # None: the whole vocabulary
    loss_buffers: int = 1  # [rows, V] arrays of the loss: LossOptions.buffers
    validate_tokens: int = 0
    reduce_bucket: int = 500_000_000
    device: Device = "cuda"


@dataclass(frozen=True)
class Setting:
    """What a plan chooses."""

    stage: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    placement: TeacherPlacement
    offload_optimizer: bool = False
    offload_parameters: bool = False
    hpz: int = 1
    tensor: int = 1  # ranks that share each layer
    sequence: int = 1  # ranks that share each sequence

    def rows(self, job: Job) -> int:
        """Positions of a micro-batch that one rank has."""
        return self.micro_batch * job.seq_len // self.sequence


@dataclass(frozen=True)
class Memory:
    """Bytes by component at the fullest moment of a step, which `moment` names; `host` are of one rank's share."""

    parts: dict[str, float]
    moment: str
    host: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())
