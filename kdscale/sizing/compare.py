"""Every setting that a job could run with: which ones fit, which is the fastest, and why the others are not chosen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from kdscale.config.distill.recompute import RECOMPUTE
from kdscale.sizing.gpus import GIB, GpuCluster
from kdscale.sizing.job import Job, Memory, Setting, TeacherPlacement
from kdscale.sizing.memory import peak_memory
from kdscale.sizing.speed import Rates, StepEstimate, estimate_step

PLACEMENTS: tuple[TeacherPlacement, ...] = ("replicated", "partitioned", "offloaded", "served")
STORED: TeacherPlacement = "cached"  # not compared unless there is a store
MOST_SEQUENCES = 64  # of a micro-batch

# Among speeds that differ by no more than this the simplest setting wins: the model is not more exact than that.
_TIE = 0.02

# Host memory that a process needs beside what is offloaded: CUDA libraries, pinned staging, the loader. Assumed.
HOST_RESERVE = 6 * GIB


@dataclass(frozen=True)
class ComparedSetting:
    """A setting, what it takes, and why it is not chosen: `reason`, and `verdict` for a narrow column ("": chosen)."""

    setting: Setting
    memory: Memory
    speed: StepEstimate
    reason: str
    fits: bool
    verdict: str = ""

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
    """The chosen setting first, if any fits, then the others by speed, served teachers last, then what does not fit.

    `global_batch` sequences per step must be a multiple of the ranks. Of each setting's micro-batches the fastest that
    fits is kept, or the smallest where none fits. A served teacher needs GPUs beyond the cluster's, so it is chosen
    only where nothing else fits or nothing else is asked for. Where nothing fits at all, ranks share sequences, by the
    smallest of the `sequence` sizes with which something fits; where that is not enough, they share layers (`tensor`).
    """

    def best(setting: Setting, ranks_sharing: int = 1) -> ComparedSetting:
        return _best_micro_batch(job, setting, cluster, global_batch * ranks_sharing // job.ranks, rates)

    settings = _settings(job, stages, placements)
    alternatives = [*_looking_ahead(settings), *_keeping_weights(settings, job)]
    compared = [best(setting) for setting in [*settings, *alternatives]]
    for size in sorted(sequence):
        if any(option.fits for option in compared):
            break
        compared += [best(replace(setting, sequence=size), size) for setting in settings]
    for size in sorted(tensor):
        if any(option.fits for option in compared):
            break
        compared += [
            best(replace(setting, tensor=size), size)
            for setting in settings
            if setting.placement == "replicated" and setting.hpz == 1
        ]
    return _ordered(compared)


def _ordered(compared: Sequence[ComparedSetting]) -> list[ComparedSetting]:
    """In the order that `compare` gives, with the reason why each one that fits is not chosen."""
    fit = sorted(
        (option for option in compared if option.fits),
        key=lambda option: (option.setting.placement == "served", -option.speed.tokens_per_second),
    )
    too_large = sorted((option for option in compared if not option.fits), key=lambda option: option.memory.total)
    eligible = [option for option in fit if option.setting.placement != "served"] or fit
    if not eligible:
        return too_large
    fastest = eligible[0].speed.tokens_per_second
    tied = [option for option in eligible if option.speed.tokens_per_second >= fastest * (1 - _TIE)]
    chosen = min(tied, key=_complexity)
    rejected = [_not_chosen(option, chosen) for option in fit if option is not chosen]
    return [chosen, *rejected, *too_large]


def _settings(job: Job, stages: Collection[int], placements: Collection[TeacherPlacement]) -> list[Setting]:
    """Every combination that makes sense, with a micro-batch of one sequence."""
    offloads = [(False, False), (True, False), (True, True)]
    groups = [1] if job.ranks == job.ranks_per_node else [1, job.ranks_per_node]
    return [
        Setting(stage, 1, 1, level, placement, *offload, hpz)
        for placement in placements
        if not (placement == "partitioned" and job.ranks == 1)
        for stage in stages
        for offload in offloads
        # only stage 3 can offload weights; with one rank, stages 2 and 3 partition nothing
        if not (offload[1] and stage != 3) and not (job.ranks == 1 and stage > 1 and not offload[1])
        # hpZ keeps a second copy of the weights in each node: worth it with several nodes and weights on the GPU
        for hpz in (groups if stage == 3 and not offload[1] else [1])
        for level in RECOMPUTE.values()
    ]


def _looking_ahead(settings: Sequence[Setting]) -> list[Setting]:
    """Those in which the student waits for links while it computes, with a teacher that works on at that time."""
    return [replace(s, overlap=True) for s in settings if s.placement == "replicated" and s.stage == 3]


def _keeping_weights(settings: Sequence[Setting], job: Job) -> list[Setting]:
    """Those that gather in every micro-batch what could stay gathered over a step: all of the weights, or a half."""
    shares = (job.student.params, job.student.params // 2)
    stay = [s for s in settings if s.stage == 3 and s.hpz == 1 and not s.offload_parameters and job.ranks > 1]
    return [replace(setting, kept=kept) for setting in stay for kept in shares]


def _best_micro_batch(job: Job, setting: Setting, cluster: GpuCluster, sequences: int, rates: Rates) -> ComparedSetting:
    """The fastest micro-batch that fits `sequences` per rank and step, or the smallest where none fits."""
    best: ComparedSetting | None = None
    for size in range(1, min(sequences, MOST_SEQUENCES) + 1):
        if sequences % size:
            continue
        option = _judge(job, replace(setting, micro_batch=size, accumulation=sequences // size), cluster, rates)
        if best is None or (option.fits and option.speed.tokens_per_second > best.speed.tokens_per_second):
            best = option
    assert best is not None
    return best


def _judge(job: Job, setting: Setting, cluster: GpuCluster, rates: Rates) -> ComparedSetting:
    memory, speed = peak_memory(job, setting), estimate_step(job, setting, cluster, rates)
    reasons, verdict = [], ""
    if memory.total > cluster.gpu.memory:
        reasons.append(f"does not fit: {memory.total / GIB:.0f} GiB of {cluster.gpu.memory / GIB:.0f}")
        verdict = "too large"
    host = (memory.host + HOST_RESERVE) * cluster.gpus_per_node
    if host > cluster.host_memory and memory.host:
        reasons.append(f"needs {host / GIB:.0f} GiB of the host's {cluster.host_memory / GIB:.0f}")
        verdict = verdict or "host full"
    return ComparedSetting(setting, memory, speed, "; ".join(reasons), not reasons, verdict)


def _complexity(option: ComparedSetting) -> tuple[int, ...]:
    setting = option.setting
    return (
        setting.offload_parameters + setting.offload_optimizer,
        setting.hpz > 1,
        setting.overlap,
        setting.kept,
        (*PLACEMENTS, STORED).index(setting.placement),
        list(RECOMPUTE).index(setting.recompute.name),
        setting.stage,
    )


def _not_chosen(rejected: ComparedSetting, chosen: ComparedSetting) -> ComparedSetting:
    """A setting that fits, with what speaks against it."""
    if rejected.setting.placement == "served":
        peak_flops = f"{rejected.speed.teacher_flops / 1e15:.1f} PFLOP/s"
        reason = f"the teacher needs GPUs of its own, {peak_flops} of them"
        return replace(rejected, reason=reason, verdict="own GPUs")
    slower = 1 - rejected.speed.tokens_per_second / chosen.speed.tokens_per_second
    if slower > _TIE:
        return replace(rejected, reason=f"{slower:.0%} slower", verdict=f"{slower:.0%} slower")
    return replace(rejected, reason="no faster, and less simple", verdict="no faster")
