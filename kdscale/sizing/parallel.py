"""Tensor parallelism in the models of memory and speed: what one of the ranks that share layers sees.

Two forms of the same job: ranks that share a layer are one data-parallel rank with a model of 1/T of each width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kdscale.sizing.gpus import GpuCluster
from kdscale.sizing.model_shape import ModelShape

if TYPE_CHECKING:
    from kdscale.sizing.job import Job, Setting


def shared(job: Job, size: int) -> Job:
    """The job as one of `size` ranks that share layers has it: hidden states are whole, all matrices are parts."""
    if size == 1:
        return job
    return replace(
        job,
        student=_part(job.student, size),
        teacher=_part(job.teacher, size),
        ranks=job.ranks // size,
        ranks_per_node=max(1, job.ranks_per_node // size),
    )


def _part(model: ModelShape, size: int) -> ModelShape:
    """The largest part: heads and units that `size` does not divide go to the first ranks. Norms count as split."""
    return replace(
        model,
        params=-(-model.params // size),
        layer=-(-model.layer // size),
        products=-(-model.products // size),
        ffn=-(-model.ffn // size),
        heads=-(-model.kv_heads // size) * (model.heads // model.kv_heads),
        kv_heads=-(-model.kv_heads // size),
        vocab=-(-model.vocab // size),
    )


def tensor_parallel_seconds(job: Job, setting: Setting, cluster: GpuCluster) -> float:
    """Seconds at full bandwidth that a step's layers wait for each other's sums (read: DeepSpeed's module_inject).

    An all-reduce of the hidden states after attention and after the ffn, and in the backward one for each projection
    that reads them (q, k, v, up and gate); computed again with checkpointing. The embedding and the loss are one more
    each. An all-reduce takes twice the time of a gather.
    """
    if setting.tensor == 1:
        return 0.0
    tokens = setting.micro_batch * setting.accumulation * job.seq_len
    student = job.student.layers * (2 * (2 if setting.checkpointing else 1) + 3 + (2 if job.student.gated else 1)) + 2
    times = student + 2 * job.teacher.layers + 1
    group = replace(cluster, nodes=1, gpus_per_node=setting.tensor)
    sizes = job.item_bytes * tokens * max(job.student.hidden, job.teacher.hidden)
    return 2 * times * group.collective(sizes)


def sequence_parallel_seconds(job: Job, setting: Setting, cluster: GpuCluster) -> float:
    """Seconds at full bandwidth of a step's exchanges around attention (read: kdscale/models/sequence_parallel.py).

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
