"""Tensor and sequence parallelism in the models of memory and speed.

T ranks that share each layer count as one data-parallel rank whose model has 1/T of each width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kdscale.sizing.gpus import GpuCluster
from kdscale.sizing.model_shape import ModelShape

if TYPE_CHECKING:
    from kdscale.sizing.job import Job, Setting


def job_of_tensor_rank(job: Job, size: int) -> Job:
    """The job as one of `size` ranks that share layers sees it: full hidden states, and a slice of every matrix."""
    if size == 1:
        return job
    return replace(
        job,
        student=_largest_slice(job.student, size),
        teacher=_largest_slice(job.teacher, size),
        others=tuple(_largest_slice(shape, size) for shape in job.others),
        ranks=job.ranks // size,
        ranks_per_node=max(1, job.ranks_per_node // size),
    )


def _largest_slice(model: ModelShape, size: int) -> ModelShape:
    """The model of the fullest rank: heads and units that `size` does not divide go to the first ranks.

    Norms are counted as if they were split too, though every rank has them in full: they are small.
    """
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
    """Seconds at full bandwidth that tensor-parallel ranks wait for each other's sums in a step.

    Read in DeepSpeed's module_inject: an all-reduce of the hidden states after attention and after the ffn, and in the
    backward one for each projection that reads them (q, k, v, up and gate); recompute repeats the one after attention.
    The embedding and the loss add one each. An all-reduce takes twice the time of a gather.
    """
    if setting.tensor == 1:
        return 0.0
    tokens = setting.micro_batch * setting.accumulation * job.seq_len
    student = job.student.layers * (2 + setting.recompute.checkpoints + 3 + (2 if job.student.gated else 1)) + 2
    all_reduces = student + 2 * sum(teacher.layers for teacher in job.teachers) + 1
    group = replace(cluster, nodes=1, gpus_per_node=setting.tensor)
    hidden_bytes = job.item_bytes * tokens * max(model.hidden for model in (job.student, *job.teachers))
    return 2 * all_reduces * group.collective(hidden_bytes)


def sequence_parallel_seconds(job: Job, setting: Setting, cluster: GpuCluster) -> float:
    """Seconds at full bandwidth of a step's exchanges around attention between sequence-parallel ranks.

    Read in kdscale/models/sequence_parallel.py: each layer sends queries, keys, values and outputs, 2·A + 2·K numbers a
    token, forward and backward, and with recompute once more; kv heads are repeated where there are fewer than
    ranks. The teacher sends its own in the forward only.
    """
    if setting.sequence == 1:
        return 0.0
    times = 2 + setting.recompute.checkpoints
    numbers = times * _exchanged_numbers(job.student, setting.sequence)
    if setting.runs_teacher:
        numbers += sum(_exchanged_numbers(teacher, setting.sequence) for teacher in job.teachers)
    group = replace(cluster, nodes=1, gpus_per_node=setting.sequence)
    return group.collective(job.item_bytes * setting.rows(job) * setting.accumulation * numbers)


def _exchanged_numbers(model: ModelShape, ranks: int) -> int:
    """Numbers a token in one forward."""
    return model.layers * (2 * model.attention + 2 * max(model.kv_heads, ranks) * model.head_dim)
