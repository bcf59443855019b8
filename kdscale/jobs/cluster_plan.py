"""`kdscale plan-cluster`: the shapes of teacher and student, the settings compared, and the lines to paste."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdscale.config.distill.settings import EIGHT_BITS
from kdscale.config.distill.targets import source_of
from kdscale.config.root import Config
from kdscale.distill.parallel.checks import unshareable_tensor
from kdscale.errors import ConfigError
from kdscale.families import load_family
from kdscale.pipeline.checks import plan_shapes
from kdscale.runs.folder import RunFolder
from kdscale.sizing.compare import PLACEMENTS, STORED, ComparedSetting, compare
from kdscale.sizing.gpus import GIB, GpuCluster
from kdscale.sizing.job import Adapters, Job, TeacherPlacement
from kdscale.sizing.layer_losses import LayerLosses
from kdscale.sizing.model_shape import ModelShape
from kdscale.sizing.speed import Rates
from kdscale.teacher.folders import student_folder, teacher_folders
from kdscale.weights import read_config


@dataclass(frozen=True)
class ClusterPlan:
    """The settings compared for a job, best first; `notes` are for the user."""

    job: Job
    cluster: GpuCluster
    rates: Rates
    global_batch: int
    tokens: int
    student_from: str
    settings: list[ComparedSetting]
    notes: list[str]

    @property
    def chosen(self) -> ComparedSetting | None:
        """The best setting; None when nothing fits."""
        return self.settings[0] if self.settings[0].fits else None


def plan_cluster(
    config: Config,
    teacher_dir: Path,
    cluster: GpuCluster,
    rates: Rates,
    *,
    tokens: int | None = None,
    stages: Collection[int] = (1, 2, 3),
    placements: Collection[TeacherPlacement] | None = None,
    document_tokens: int | None = None,
) -> ClusterPlan:
    """Compare settings for the config's distillation on `cluster`; reads config.json and plan.json only.

    `document_tokens`: of each document, which attention keeps apart; None: one document a row.
    Raises ConfigError for a placement that this version's config does not have, or a budget that cannot be met.
    """
    known = _placements(config)
    if placements is not None and (unknown := set(placements) - set(known)):
        raise ConfigError("--teacher " + ", ".join(sorted(unknown)), expected=" or ".join(known))
    distill, notes = config.distill, []
    teacher, student, model, student_from = _shapes(config, teacher_dir)
    batch = -(-distill.global_batch // cluster.ranks) * cluster.ranks
    if batch != distill.global_batch:
        notes.append(
            f"global_batch {distill.global_batch} is not a multiple of {cluster.ranks} ranks: planned with {batch}"
        )
    needs = distill.needs
    shapes = {
        name: teacher if folder == teacher_dir else ModelShape.of_config(read_config(folder))
        for name, folder in teacher_folders(config, teacher_dir, config_only=True).items()
    }
    of_student = [name for name, one in distill.by_teacher().items() if one.source.is_student]
    first, *others = (shapes | dict.fromkeys(of_student, student)).values()
    if of_student:
        stages = [stage for stage in stages if stage < 3] or [2]
        notes.append("with a teacher made of the student: ZeRO stages below 3, whole teachers on every rank")
    if others:
        notes.append(f"{1 + len(others)} teachers are planned with one teacher_placement, and each sees every token")
    job = Job(
        student,
        first,
        seq_len=distill.seq_len,
        ranks=cluster.ranks,
        ranks_per_node=cluster.gpus_per_node,
        item_bytes=4 if distill.dtype == "float32" else 2,
        gradient_bytes=2 if distill.dtype != "float32" and distill.zero.gradient_dtype == "bfloat16" else 4,
        top_k=None if needs.full else max(needs.top_k, needs.sampled),
        layer_losses=LayerLosses.of(distill.objectives, student),
        validate_tokens=distill.validate_tokens,
        reduce_bucket=distill.zero.reduce_bucket or 500_000_000,
        document_tokens=document_tokens,
        teacher_dtype=distill.teacher_dtype,
        others=tuple(others),
        average=bool(distill.followers),
        adapters=Adapters.of(distill.lora, model, student_from),
        reference=distill.lora is None and distill.preferences is not None and distill.preferences.needs_reference,
        base=bool(of_student) and not distill.followers,
    )
    if job.teacher_dtype == "float8" and not cluster.gpu.float8:
        raise ConfigError(
            "distill.teacher_dtype", expected="for float8 an NVIDIA GPU of compute capability 8.9 or newer",
            got=cluster.gpu.name, hint="teacher_dtype: int8, which takes as little memory; or bfloat16",
        )  # fmt: skip
    if job.item_bytes == 4:
        notes.append("distill.dtype is float32: the GPU's FLOP/s are of bf16, so speeds are several times too high")
    settings = compare(
        job, cluster, batch, rates, stages=stages, placements=placements or known,
        tensor=_tensor_sizes(config, teacher_dir, job), sequence=_sequence_sizes(config, job),
    )  # fmt: skip
    return ClusterPlan(job, cluster, rates, batch, tokens or distill.tokens, student_from, settings, notes)


def _placements(config: Config) -> list[TeacherPlacement]:
    """The placements from which the config's objectives can get their targets, of the dtype that it asks for.

    `cached` is one where the config has a store.
    """
    needs, stored, dtype = config.distill.needs, config.targets, config.distill.teacher_dtype
    found = [name for name in PLACEMENTS if not needs.missing_from(source_of(name).gives)]
    if dtype in EIGHT_BITS or any(one.source.is_student for one in config.distill.by_teacher().values()):
        return [name for name in found if name == "replicated"]
    if dtype != "auto":
        return [name for name in found if source_of(name).in_process]
    if stored is not None and not needs.missing_from(stored.codec.gives):
        found.append(STORED)
    return found


def _tensor_sizes(config: Config, teacher_dir: Path, job: Job) -> list[int]:
    """Numbers of ranks of one node that can share the layers of both models."""
    model = read_config(teacher_dir)
    family = load_family(model, str(teacher_dir / "config.json"))
    distill = config.distill
    if distill.need_whole_head() or distill.needs.sampled or job.teacher_dtype in EIGHT_BITS:
        return []
    if job.average or job.base or job.adapters is not None:
        return []
    if unshareable_tensor(family, model) is not None:
        return []
    most = min(model.kv_heads for model in (job.student, *job.teachers))
    return [size for size in (2, 4, 8) if job.ranks_per_node % size == 0 and size <= most]


def _sequence_sizes(config: Config, job: Job) -> list[int]:
    """Numbers of ranks of one node that can share the sequences of both models."""
    if any(entry.needs_whole_sequences for entry in config.distill.objectives):
        return []
    return [
        size
        for size in (2, 4, 8)
        if job.ranks_per_node % size == 0
        and job.seq_len % size == 0
        and all(
            m.heads % size == 0 and (m.kv_heads % size == 0 or size % m.kv_heads == 0)
            for m in (job.student, *job.teachers)
        )
    ]


def _shapes(config: Config, teacher_dir: Path) -> tuple[ModelShape, ModelShape, dict[str, Any], str]:
    """Shapes of teacher and student, the student's config.json, and where its sizes come from, for people to read."""
    run = RunFolder(Path(config.run_dir))
    source = read_config(teacher_dir)
    plans = plan_shapes(config, teacher_dir)
    if config.steps and config.distill.teacher == "previous" and len(plans) > len(config.steps):
        first = source
        for plan in plans[:-1]:
            family = load_family(first, str(teacher_dir))
            first = family.student_config(first, plan.student.dims(), plan.kept.layers)
        teacher = ModelShape.of_config(first, "the step before")
    else:
        teacher = ModelShape.of_config(source, str(teacher_dir / "config.json"))
    if (run.pruned / "config.json").exists():
        model = read_config(run.pruned)
        return teacher, ModelShape.of_config(model, str(run.pruned)), model, "the pruned student"
    if config.student is not None:
        ready = student_folder(config, config_only=True)
        model = read_config(ready)
        return teacher, ModelShape.of_config(model, str(ready)), model, "the ready student"
    if not config.steps and run.plan.exists():
        return teacher, *_planned_student(source, run.plan, teacher_dir), "plan.json"
    if len(plans) <= len(config.steps):  # a latency target is measured, so there is no shape yet
        return teacher, teacher, source, "the teacher's sizes, until kdscale plan has measured latencies"
    model = source
    for plan in plans:
        model = load_family(model, str(teacher_dir)).student_config(model, plan.student.dims(), plan.kept.layers)
    return teacher, ModelShape.of_config(model, "the student"), model, "the config's target"


def _planned_student(source: dict[str, Any], path: Path, teacher_dir: Path) -> tuple[ModelShape, dict[str, Any]]:
    """The student's shape as plan.json has it, and its config.json."""
    from kdscale.prune.plan import Plan

    plan = Plan.load(path)
    family = load_family(source, str(teacher_dir))
    model = family.student_config(source, plan.student.dims(), plan.kept.layers)
    shape = ModelShape.of_config(model, str(path))
    # rotating the teacher's hidden states gives it a head of its own where it had a tied one
    tied = shape.tied and shape.params == plan.student_params.total
    return replace(shape, params=plan.student_params.total, tied=tied), model


def snippet(plan: ClusterPlan) -> str:
    """The chosen setting as YAML for the config. Raises ConfigError when nothing fits."""
    if plan.chosen is None:
        least = plan.settings[0]
        raise ConfigError(
            "no setting fits",
            expected=f"at most {plan.cluster.gpu.memory / GIB:.0f} GiB per GPU",
            got=f"at least {least.memory.total / GIB:.0f} GiB ({least.reason})",
            hint="more GPUs, shorter sequences, or a smaller student",
        )
    setting = plan.chosen.setting
    lines = ["distill:", f"  processes: {plan.job.ranks}", f"  global_batch: {plan.global_batch}"]
    lines += [f"  micro_batch: {setting.micro_batch}", f"  zero_stage: {setting.stage}"]
    zero = ["    offload_optimizer: cpu"] if setting.offload_optimizer else []
    zero += ["    offload_parameters: cpu"] if setting.offload_parameters else []
    zero += [f"    hpz_partition_size: {setting.hpz}"] if setting.hpz > 1 else []
    zero += [f"    keep_gathered: {setting.kept}"] if setting.kept else []
    lines += ["  zero:", *zero] if zero else []
    lines += [f"  tensor_parallel: {setting.tensor}"] if setting.tensor > 1 else []
    lines += [f"  sequence_parallel: {setting.sequence}"] if setting.sequence > 1 else []
    lines += [f"  gradient_checkpointing: {setting.recompute.name}"]
    if plan.job.others:
        lines += [f"  # in each of teachers: teacher_placement: {setting.placement}, unless it is ema"]
    else:
        placement = "base" if plan.job.base else "ema" if plan.job.average else setting.placement
        lines += [f"  teacher_placement: {placement}"]
    lines += ["  teacher_overlap: true"] if setting.overlap else []
    if setting.placement == "served":
        lines += ["  served:", "    urls: []  # the addresses that kdscale serve-teacher prints"]
    return "\n".join(lines) + "\n"


def to_json(plan: ClusterPlan) -> dict[str, Any]:
    """Everything that the tables show, as JSON values: bytes, seconds, tokens per second."""
    return {
        "cluster": {
            "gpu": plan.cluster.gpu.name, "nodes": plan.cluster.nodes, "gpus_per_node": plan.cluster.gpus_per_node,
            "gpu_memory_bytes": plan.cluster.gpu.memory, "gpu_flops_per_second": plan.cluster.gpu.flops,
            "host_memory_bytes": plan.cluster.host_memory,
        },
        "assumed": {"share_of_flops": plan.rates.compute, "share_of_bandwidth": plan.rates.links},
        "teacher_params": plan.job.teacher_params, "student_params": plan.job.student.params,
        "trained_params": plan.job.trained,
        "student_from": plan.student_from, "seq_len": plan.job.seq_len,
        "document_tokens": plan.job.row[0], "global_batch": plan.global_batch,
        "tokens": plan.tokens, "notes": plan.notes,
        "settings": [_setting_json(compared, plan.tokens, compared is plan.chosen) for compared in plan.settings],
    }  # fmt: skip


def _setting_json(compared: ComparedSetting, tokens: int, chosen: bool) -> dict[str, Any]:
    setting, memory, speed = compared.setting, compared.memory, compared.speed
    return {
        "chosen": chosen, "fits": compared.fits, "reason": compared.reason, "zero_stage": setting.stage,
        "teacher_placement": setting.placement, "offload_optimizer": setting.offload_optimizer,
        "offload_parameters": setting.offload_parameters, "hpz_partition_size": setting.hpz,
        "keep_gathered": setting.kept,
        "gradient_checkpointing": setting.recompute.name, "tensor_parallel": setting.tensor,
        "sequence_parallel": setting.sequence, "teacher_overlap": setting.overlap,
        "micro_batch": setting.micro_batch, "accumulation": setting.accumulation,
        "gpu_bytes": memory.total, "gpu_bytes_by_component": memory.parts, "fullest_moment": memory.moment,
        "host_bytes_per_rank": memory.host,
        "seconds_per_step": speed.seconds, "tokens_per_second": speed.tokens_per_second, "mfu": speed.mfu,
        "days": compared.seconds(tokens) / 86_400,
    }  # fmt: skip
