"""Sequence parallelism in the model of speed: what the ranks of a sequence exchange."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kdscale.sizing.gpus import Cluster
from kdscale.sizing.shape import ModelShape

if TYPE_CHECKING:
    from kdscale.sizing.memory import Job, Setting


def exchange_seconds(job: Job, setting: Setting, cluster: Cluster) -> float:
    """Seconds at full bandwidth of a step's exchanges around attention (read: kdscale/sequence.py).

    Each layer sends queries, keys, values and outputs, 2·A + 2·K numbers a token, forward and backward, and with
    checkpointing once more; kv heads are repeated where they are fewer than the ranks. The teacher's go forward only.
    """
    if setting.sequence == 1:
        return 0.0
    times = 3 if setting.checkpointing else 2
    numbers = times * _numbers(job.student, setting.sequence)
    if setting.placement != "served":
        numbers += _numbers(job.teacher, setting.sequence)
    group = replace(cluster, nodes=1, gpus_per_node=setting.sequence)
    return group.collective(job.item_bytes * setting.rows(job) * setting.accumulation * numbers)


def _numbers(model: ModelShape, ranks: int) -> int:
    return model.layers * (2 * model.attention + 2 * max(model.kv_heads, ranks) * model.head_dim)
