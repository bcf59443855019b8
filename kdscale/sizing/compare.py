"""Every setting that a job could run with, which fit, which is fastest, and why the others are not taken."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from kdscale.sizing.gpus import GIB, GpuCluster
from kdscale.sizing.job import Job, Memory, Setting, TeacherPlacement
from kdscale.sizing.memory import peak_memory
from kdscale.sizing.speed import Rates, StepEstimate, estimate_step

PLACEMENTS: tuple[TeacherPlacement, ...] = ("replicated", "partitioned", "offloaded", "served")


MOST_SEQUENCES = 64  # of a micro-batch


# Of speeds that differ by no more than this the simplest setting is taken: the model is not better than that.
_TIE = 0.02


# What a process needs of its host beside what is offloaded: CUDA libraries, pinned staging, the loader. Assumed.
HOST_RESERVE = 6 * GIB


@dataclass(frozen=True)
class ComparedSetting:
    """A setting, what it takes, and in `reason` why it is not the one ("" for the one that is chosen)."""

    setting: Setting
    memory: Memory
    speed: StepEstimate
    reason: str
    fits: bool

    def seconds(self, tokens: int) -> float:
        """How long `tokens` tokens of training take."""
        return tokens / self.speed.tokens_per_second


def compare(
    job: Job,
    cluster: GpuCluster,
    global_batch: int,
    rates: Rates,
    *,
    stages: Collection[int] = (1, 2, 3),
    placements: Collection[TeacherPlacement] = PLACEMENTS,
    tensor: Collection[int] = (),
    sequence: Collection[int] = (),
) -> list[ComparedSetting]:
    """The chosen one first, if any fits, then the others by speed, served teachers last, then those that do not fit.

    `global_batch` sequences a step must be a multiple of the ranks. Of the micro-batches of a setting the fastest that
    fits is kept, or the smallest when none does. A served teacher needs GPUs beyond the cluster's, so it is chosen
    only where nothing else fits or nothing else is asked for. Where nothing fits, sequences are shared by the fewest of
    `sequence` ranks with which anything does; where nothing does then, layers by the fewest of `tensor`.
    """
    found = [
        _best_micro_batch(job, setting, cluster, global_batch // job.ranks, rates)
        for setting in _settings(job, stages, placements)
    ]
    for size in sorted(sequence):
        if any(one.fits for one in found):
            break
        found += [
            _best_micro_batch(job, replace(setting, sequence=size), cluster, global_batch * size // job.ranks, rates)
            for setting in _settings(job, stages, placements)
        ]
    for size in sorted(tensor):
        if any(one.fits for one in found):
            break
        found += [
            _best_micro_batch(job, replace(setting, tensor=size), cluster, global_batch * size // job.ranks, rates)
            for setting in _settings(job, stages, placements)
            if setting.placement == "replicated" and setting.hpz == 1
        ]
    fit = sorted(
        (one for one in found if one.fits),
        key=lambda one: (one.setting.placement == "served", -one.speed.tokens_per_second),
    )
    rest = sorted((one for one in found if not one.fits), key=lambda one: one.memory.total)
    own = [one for one in fit if one.setting.placement != "served"] or fit
    if not own:
        return rest
    fastest = own[0].speed.tokens_per_second
    tied = [one for one in own if one.speed.tokens_per_second >= fastest * (1 - _TIE)]
    chosen = min(tied, key=_complication)
    others = [replace(one, reason=_why_not(one, chosen)) for one in fit if one is not chosen]
    return [chosen, *others, *rest]


def _settings(job: Job, stages: Collection[int], placements: Collection[TeacherPlacement]) -> list[Setting]:
    offloads = [(False, False), (True, False), (True, True)]
    groups = [1] if job.ranks == job.ranks_per_node else [1, job.ranks_per_node]
    return [
        Setting(stage, 1, 1, checkpointing, placement, *offload, hpz)
        for placement in placements
        if not (placement == "partitioned" and job.ranks == 1)
        for stage in stages
        for offload in offloads
        # weights leave the GPU at stage 3 only; stage 2 and 3 of one rank partition nothing
        if not (offload[1] and stage != 3) and not (job.ranks == 1 and stage > 1 and not offload[1])
        # a second copy of the weights in each node: where there are several nodes, and weights on the GPU
        for hpz in (groups if stage == 3 and not offload[1] else [1])
        for checkpointing in (False, True)
    ]


def _best_micro_batch(job: Job, setting: Setting, cluster: GpuCluster, sequences: int, rates: Rates) -> ComparedSetting:
    best: ComparedSetting | None = None
    for size in range(1, min(sequences, MOST_SEQUENCES) + 1):
        if sequences % size:
            continue
        one = _judge(job, replace(setting, micro_batch=size, accumulation=sequences // size), cluster, rates)
        if best is None or (one.fits and one.speed.tokens_per_second > best.speed.tokens_per_second):
            best = one
    assert best is not None
    return best


def _judge(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> ComparedSetting:
    memory, speed = peak_memory(job, setting), estimate_step(job, setting, cluster, rates)
    reasons = []
    if memory.total > cluster.gpu.memory:
        reasons.append(f"does not fit: {memory.total / GIB:.0f} GiB of {cluster.gpu.memory / GIB:.0f}")
    host = (memory.host + HOST_RESERVE) * cluster.gpus_per_node
    if host > cluster.host_memory and memory.host:
        reasons.append(f"needs {host / GIB:.0f} GiB of the host's {cluster.host_memory / GIB:.0f}")
    return ComparedSetting(setting, memory, speed, "; ".join(reasons), not reasons)


def _complication(one: ComparedSetting) -> tuple[int, ...]:
    setting = one.setting
    return (
        setting.offload_parameters + setting.offload_optimizer,
        setting.hpz > 1,
        PLACEMENTS.index(setting.placement),
        setting.checkpointing,
        setting.stage,
    )


def _why_not(one: ComparedSetting, chosen: ComparedSetting) -> str:
    if one.setting.placement == "served":
        peak_flops = f"{one.speed.teacher_flops / 1e15:.1f} PFLOP/s"
        return f"the teacher needs GPUs of its own, {peak_flops} of them"
    slower = 1 - one.speed.tokens_per_second / chosen.speed.tokens_per_second
    return f"{slower:.0%} slower" if slower > _TIE else "no faster, and less simple"
