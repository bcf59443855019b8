"""Seconds of a training step, tokens a second and MFU, from FLOPs and bytes over links.

A model of what should be, not a measurement: products run at `Rates.compute` of the GPU's peak, collectives at
`Rates.links` of their bandwidth. Overlap as DeepSpeed 0.19.8 does it: stage 3 gathers and reduces while it computes,
the teacher's layers come while the one before them computes; everything else is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdscale.sizing.flops import ModelFlops, mfu, step_flops
from kdscale.sizing.gpus import GpuCluster
from kdscale.sizing.job import Job, Setting
from kdscale.sizing.parallel import sequence_parallel_seconds, shared, tensor_parallel_seconds

# Products of few rows are bound by launches and by reading the weights: half of the share at so many tokens. Assumed.
_HALF_AT_TOKENS = 256


# Adam reads gradient, master and two moments and writes the three and the weight: 16 + 12 + 2 bytes a parameter.
_ADAM_BYTES = 30


@dataclass(frozen=True)
class Rates:
    """Shares of peak that are reached: of the GPU's FLOP/s while it computes, of a link's bandwidth."""

    compute: float = 0.40
    links: float = 0.70


@dataclass(frozen=True)
class StepEstimate:
    """`seconds` of a step by component, and what follows from their sum; `mfu` as the training log has it."""

    seconds: dict[str, float]
    tokens_per_second: float
    mfu: float
    teacher_flops: float  # a second, that whoever runs the teacher must do

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return sum(self.seconds.values())


def estimate_step(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> StepEstimate:
    """The time of one step. The loss's three products are counted with the student's head."""
    waiting = (
        tensor_parallel_seconds(job, setting, cluster) + sequence_parallel_seconds(job, setting, cluster)
    ) / rates.links
    served, all_ranks_peak = setting.placement == "served", cluster.gpu.flops * job.ranks
    models = [ModelFlops.of_shape(shape, job.seq_len) for shape in (job.student, job.teacher)]
    job = shared(job, setting.tensor)
    rows = setting.rows(job)
    tokens = rows * setting.accumulation  # of one rank
    peak = cluster.gpu.flops * rates.compute * rows / (rows + _HALF_AT_TOKENS)
    student, teacher = (ModelFlops.of_shape(shape, job.seq_len).forward for shape in (job.student, job.teacher))
    again = student - 2.0 * job.student.head if setting.checkpointing else 0.0
    hidden, shown = _student_transfers(job, setting, cluster, rates)
    seconds = {
        "teacher": 0.0 if served else max(tokens * teacher / peak, _teacher_transfers(job, setting, cluster, rates)),
        "student": max(tokens * (3 * student + again) / peak, hidden),
        "communication": shown + waiting,
        "optimiser": _optimizer_seconds(job, setting, cluster),
    }
    step = sum(seconds.values())
    step_tokens = tokens * job.ranks  # packed text: every token has a label
    needed = step_flops(None if served else models[1], models[0], step_tokens, step_tokens)
    rate = step_tokens / step
    return StepEstimate(seconds, rate, mfu(needed, step, all_ranks_peak), rate * models[1].forward)


def _student_transfers(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> tuple[float, float]:
    """(seconds while computing, seconds beside it) of a step's collectives.

    Bytes as in ZeRO (arXiv 1910.02054, section 7): stage 0 an all-reduce, stage 1 and 2 reduce and gather once the
    weights, stage 3 gathers twice and reduces. Stage 2 and 3 reduce in every micro-batch, stage 1 once a step (read).
    hpZ's second gather stays within its group.
    """
    whole = job.item_bytes * job.student.params
    once = cluster.collective(whole) / rates.links if job.ranks > 1 else 0.0
    times = setting.accumulation
    if setting.stage == 3:
        inside = cluster.within_node(whole) / rates.links if 1 < setting.hpz <= cluster.gpus_per_node else once
        share = 2 * whole / job.ranks / cluster.gpu.pcie if setting.offload_parameters else 0.0
        return times * (2 * once + inside + share), 0.0
    return 0.0, once * (1 + times if setting.stage == 2 else 2)


def _teacher_transfers(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> float:
    """Every forward brings the whole teacher: over all ranks' shards, or from the host's memory to each GPU."""
    whole = job.item_bytes * job.teacher.params * setting.accumulation
    if setting.placement == "partitioned":
        return cluster.collective(whole) / rates.links if job.ranks > 1 else 0.0
    return whole / cluster.gpu.pcie if setting.placement == "offloaded" else 0.0


def _optimizer_seconds(job: Job, setting: Setting, cluster: GpuCluster) -> float:
    """Adam is bound by memory; offloaded, by the host's, with gradients down (every micro-batch) and weights up."""
    share = job.student.params / (job.ranks if setting.stage else 1)
    if not setting.offload_optimizer:
        return _ADAM_BYTES * share / cluster.gpu.hbm
    sent = job.item_bytes * share * (setting.accumulation + 1)
    return _ADAM_BYTES * share * cluster.gpus_per_node / cluster.host_bandwidth + sent / cluster.gpu.pcie
