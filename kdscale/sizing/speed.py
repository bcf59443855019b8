"""Seconds of a training step, tokens a second and MFU, from FLOPs and bytes over links.

A model of what should be, not a measurement: products run at `Rates.compute` of the GPU's peak, collectives at
`Rates.links` of their bandwidth. Overlap as DeepSpeed 0.19.8 does it: stage 3 gathers and reduces while it computes,
the teacher's layers come while the one before them computes; everything else is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdscale.sizing.flops import forward_flops
from kdscale.sizing.gpus import Cluster
from kdscale.sizing.job import Job, Setting
from kdscale.sizing.parallel import exchange_seconds, layer_seconds, shared

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
class Speed:
    """`mfu`: FLOPs that the step needs (not those computed again) over peak. `seconds`: of a step, by part."""

    seconds: dict[str, float]
    tokens_per_second: float
    mfu: float
    teacher_flops: float  # a second, that whoever runs the teacher must do

    @property
    def step(self) -> float:
        return sum(self.seconds.values())


def estimate(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> Speed:
    """The loss's three products are counted with the student's head."""
    waiting = (layer_seconds(job, setting, cluster) + exchange_seconds(job, setting, cluster)) / rates.links
    job = shared(job, setting.tensor)
    rows = setting.rows(job)
    tokens = rows * setting.accumulation  # of one rank
    peak = cluster.gpu.flops * rates.compute * rows / (rows + _HALF_AT_TOKENS)
    student = forward_flops(job.student, job.seq_len)
    teacher = forward_flops(job.teacher, job.seq_len)
    again = student - 2.0 * job.student.head if setting.checkpointing else 0.0
    hidden, shown = _student_transfers(job, setting, cluster, rates)
    served = setting.placement == "served"
    seconds = {
        "teacher": 0.0 if served else max(tokens * teacher / peak, _teacher_transfers(job, setting, cluster, rates)),
        "student": max(tokens * (3 * student + again) / peak, hidden),
        "communication": shown + waiting,
        "optimiser": _optimizer_seconds(job, setting, cluster),
    }
    step = sum(seconds.values())
    needed = 3 * student + (0.0 if served else teacher)
    rate = tokens * job.ranks / step
    return Speed(seconds, rate, needed * tokens / step / cluster.gpu.flops, rate * teacher)


def _student_transfers(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> tuple[float, float]:
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


def _teacher_transfers(job: Job, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Every forward brings the whole teacher: over all ranks' shards, or from the host's memory to each GPU."""
    whole = job.item_bytes * job.teacher.params * setting.accumulation
    if setting.placement == "partitioned":
        return cluster.collective(whole) / rates.links if job.ranks > 1 else 0.0
    return whole / cluster.gpu.pcie if setting.placement == "offloaded" else 0.0


def _optimizer_seconds(job: Job, setting: Setting, cluster: Cluster) -> float:
    """Adam is bound by memory; offloaded, by the host's, with gradients down (every micro-batch) and weights up."""
    share = job.student.params / (job.ranks if setting.stage else 1)
    if not setting.offload_optimizer:
        return _ADAM_BYTES * share / cluster.gpu.hbm
    sent = job.item_bytes * share * (setting.accumulation + 1)
    return _ADAM_BYTES * share * cluster.gpus_per_node / cluster.host_bandwidth + sent / cluster.gpu.pcie
