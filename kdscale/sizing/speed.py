"""Seconds of a training step, tokens per second and MFU, from FLOPs and bytes over links.

This predicts, it does not measure: products run at `Rates.compute` of the GPU's peak, collectives at `Rates.links` of
their bandwidth. What overlaps is what DeepSpeed 0.19.8 overlaps: stage 3 gathers and reduces while it computes, and a
teacher's layer is fetched while the one before it computes. Everything else is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdscale.sizing.flops import ModelFlops, adapter_flops, mfu, recomputed_flops, step_flops, student_passes
from kdscale.sizing.gpus import GpuCluster
from kdscale.sizing.job import Job, Setting
from kdscale.sizing.memory import recomputed_bytes
from kdscale.sizing.parallel import job_of_tensor_rank, sequence_parallel_seconds, tensor_parallel_seconds

# Products of few rows are bound by launches and by reading the weights: at so many tokens they reach half of
# `Rates.compute`. Assumed.
_HALF_AT_TOKENS = 256

# What is computed again is bound by memory but for its products: an element-wise operation reads and writes about so
# many bytes for each one that autograd keeps. Assumed.
_BYTES_AGAIN = 3

# Adam reads gradient, master and two moments and writes the three and the weight: 16 + 12 + 2 bytes per parameter.
_ADAM_BYTES = 30


@dataclass(frozen=True)
class Rates:
    """How much of its peak the hardware reaches: of a GPU's FLOP/s while it computes, and of a link's bandwidth."""

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
        """Seconds of one step."""
        return sum(self.seconds.values())


def estimate_step(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> StepEstimate:
    """The time of one step and what follows from it. The loss's three products are counted with the student's head."""
    waiting = tensor_parallel_seconds(job, setting, cluster) + sequence_parallel_seconds(job, setting, cluster)
    student, teacher = ModelFlops.of_shape(job.student), _teachers(job)
    seconds = _seconds(job_of_tensor_rank(job, setting.tensor), setting, cluster, rates, waiting / rates.links)
    step = sum(seconds.values())
    tokens = setting.rows(job) * setting.accumulation * job.ranks // setting.tensor  # of a whole step
    documents, losses = job.row * (tokens // job.seq_len), job.layer_losses.flops(job.student, job.teacher)
    ran = teacher if setting.runs_teacher else None
    flops = step_flops(ran, student, tokens, tokens, documents, losses, _adapters(job))
    rate = tokens / step
    teacher_rate = 0.0 if setting.placement == "cached" else rate * teacher.of_a_token(job.row)
    return StepEstimate(seconds, rate, mfu(flops, step, cluster.gpu.flops * job.ranks), teacher_rate)


def _adapters(job: Job) -> int | None:
    """Their parameters; None without any."""
    return None if job.adapters is None else job.adapters.params


def _teachers(job: Job) -> ModelFlops:
    """Of all teachers together, each of which sees all tokens."""
    teachers = ModelFlops.together([ModelFlops.of_shape(shape) for shape in job.teachers])
    assert teachers is not None
    return teachers


def _seconds(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates, waiting: float) -> dict[str, float]:
    """Seconds of a step by component, of the job as one rank sees it; `waiting` for the ranks it shares with."""
    rows = setting.rows(job)
    tokens = rows * setting.accumulation
    peak = cluster.gpu.flops * rates.compute * rows / (rows + _HALF_AT_TOKENS)
    student, teacher = (model.of_a_token(job.row) for model in (ModelFlops.of_shape(job.student), _teachers(job)))
    losses = job.layer_losses.flops(job.student, job.teacher).of_a_token(job.row)
    recomputed = recomputed_flops(job.student, setting.recompute, job.row)
    again = recomputed_bytes(job, job.student, setting.recompute) * job.student.layers
    hidden, exposed = _student_transfers(job, setting, cluster, rates)
    if job.teacher_dtype == "float8":  # as much less time as the peaks differ: assumed
        teacher -= 2.0 * sum(shape.linears for shape in job.teachers) * (1 - 1 / cluster.gpu.float8)
    teacher_seconds = max(tokens * teacher / peak, _teacher_transfers(job, setting, cluster, rates))
    if job.teacher_dtype == "int8":  # each weight is read, written in its dtype and read again, in every forward
        widened = (1 + 2 * job.teacher_bytes) * sum(shape.linears for shape in job.teachers)
        teacher_seconds += setting.accumulation * widened / cluster.gpu.hbm
    trained = student_passes(_adapters(job)) * student + adapter_flops(_adapters(job))
    computing = tokens * ((trained + recomputed + losses) / peak + _BYTES_AGAIN * again / cluster.gpu.hbm)
    if setting.overlap:  # products are no faster beside each other: gained is what the student waits for links
        teacher_seconds -= min(max(0.0, hidden - computing), teacher_seconds * (1 - 1 / setting.accumulation))
    return {
        "teacher": teacher_seconds if setting.runs_teacher else 0.0,
        "student": max(computing, hidden),
        "communication": exposed + waiting,
        "optimiser": _optimizer_seconds(job, setting, cluster),
    }


def _student_transfers(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> tuple[float, float]:
    """(seconds hidden behind computing, seconds added to it) of a step's collectives.

    Bytes as in ZeRO (arXiv 1910.02054, section 7): stage 0 does an all-reduce, stages 1 and 2 reduce gradients and
    gather weights once, stage 3 gathers twice and reduces. Stages 2 and 3 reduce in every micro-batch, stage 1 once a
    step, and where it adds in fp32 by an all-reduce (read in DeepSpeed). With hpZ the second gather stays within its
    group (arXiv 2306.10209). Weights that stay gathered are gathered once, after the optimiser's step.
    """
    weights = job.item_bytes * job.weights
    once = cluster.collective(weights) / rates.links if job.ranks > 1 else 0.0
    reduced = once * job.gradient_bytes / job.item_bytes * job.trained / job.weights
    micro_batches = setting.accumulation
    if setting.stage == 3:
        second_gather = cluster.within_node(weights) / rates.links if 1 < setting.hpz <= cluster.gpus_per_node else once
        from_host = 2 * weights / job.ranks / cluster.gpu.pcie if setting.offload_parameters else 0.0
        kept = min(1.0, setting.kept / job.student.params)
        gathers = (1 - kept) * (once + second_gather)
        return micro_batches * (gathers + reduced + from_host), kept * once
    gathered = once * job.trained / job.weights  # of what a step changed
    if setting.stage == 2:
        return 0.0, gathered + micro_batches * reduced
    return 0.0, gathered + reduced * (2 if job.gradient_bytes > job.item_bytes else 1)


def _teacher_transfers(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> float:
    """Seconds to fetch the teacher for every forward: from all ranks, or from the host's memory to each GPU."""
    weights = job.teacher_bytes * job.teacher_params * setting.accumulation
    if setting.placement == "partitioned":
        return cluster.collective(weights) / rates.links if job.ranks > 1 else 0.0
    return weights / cluster.gpu.pcie if setting.placement == "offloaded" else 0.0


def _optimizer_seconds(job: Job, setting: Setting, cluster: GpuCluster) -> float:
    """Seconds of Adam, which is bound by memory bandwidth.

    Offloaded it is bound by the host's; gradients go down in every micro-batch (at stages 1 and 2 that add them in fp32
    once), and weights come up once.
    """
    params = job.trained / (job.ranks if setting.stage else 1)
    if not setting.offload_optimizer:
        return _ADAM_BYTES * params / cluster.gpu.hbm
    times = 1 if setting.stage < 3 and job.gradient_bytes > job.item_bytes else setting.accumulation
    sent = params * (job.gradient_bytes * times + job.item_bytes)
    return _ADAM_BYTES * params * cluster.gpus_per_node / cluster.host_bandwidth + sent / cluster.gpu.pcie
