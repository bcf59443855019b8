"""Distillation on DeepSpeed: join the group, load the models, build the engine, resume, train, export.

A single CPU process runs the same code as a rank that a launcher starts under RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT: it is a group of one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdscale import files
from kdscale.config.distill.encoder_objectives import task_of
from kdscale.config.distill.objective import ObjectiveConfig
from kdscale.config.root import Config
from kdscale.data.batches import LoaderState, PackedLoader
from kdscale.data.token_store import TokenStore
from kdscale.distill import load_models
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint.merge_adapters import AdaptersOnDisk
from kdscale.distill.checkpoint.rank_files import RankFileIndex, RankFileReader, quantities_of
from kdscale.distill.checkpoint.saver import SavePolicy, Saver
from kdscale.distill.checkpoint.zero_state import ZeroState
from kdscale.distill.compare_teachers import compare_teachers
from kdscale.distill.export import export_checkpoint
from kdscale.distill.load_models import Folders, Models, RankSetup
from kdscale.distill.on_policy.opening import open_samples
from kdscale.distill.optimizer import make_optimizer
from kdscale.distill.parallel.deepspeed_config import check_machine, deepspeed_config
from kdscale.distill.parallel.dtypes import agreed_dtype, buffer_dtypes, check_buffers_kept, slow_products
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.parallel.process_group import check_world, has_async_io, join_group
from kdscale.distill.parallel.tensor_parallel import ModelSlices
from kdscale.distill.schedule import shorter_phases, total_steps
from kdscale.distill.step import StudentModule
from kdscale.distill.telemetry.observer import make_observer
from kdscale.distill.trainer import Trainer
from kdscale.distill.validate import Validator, held_out_batches
from kdscale.errors import CheckpointError, ConfigError
from kdscale.models.attention import choice_for
from kdscale.models.parameter_map import trained_tensors
from kdscale.packaging.model_card import student_card
from kdscale.responses.pairs import Pairs
from kdscale.responses.prompts import Prompts
from kdscale.runs.folder import ADAPTER, KERNELS
from kdscale.runtime.device import set_threads
from kdscale.runtime.gpu_binding import rank_device
from kdscale.runtime.kernel_backend import agree_on_backend, agree_on_compiling, try_launch
from kdscale.runtime.library_output import quiet
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import HostSums, is_main, on_main, rank, world_size
from kdscale.runtime.timeouts import group_timeout
from kdscale.teacher.folders import teacher_folders
from kdscale.teacher.placement.eight_bits import check_eight_bits
from kdscale.weights import Checkpoint, checkpoint_identity
from kdscale_launch.watchdog import enter


def run(
    cfg: Config, *, teacher_dir: Path, student_dir: Path, data_dir: Path, run_dir: Path, reporter: Reporter
) -> None:
    """Distil `teacher_dir` into `student_dir`'s model; the result is `run_dir`/student.

    Goes on from the newest complete checkpoint in `run_dir`/checkpoints. Raises Interrupted (after saving) on SIGINT
    and SIGTERM, TrainingError when steps keep being non-finite, RunFolderError on a checkpoint of another run.
    """
    reporter = reporter if is_main() else Reporter(quiet=True)
    folders = Folders(teacher_dir, student_dir, data_dir, run_dir)
    session = open_session(cfg, folders, reporter)
    trainer = session.trainer
    try:
        trainer.train(session.start)
    except BaseException as error:
        trainer.observer.close(error)
        raise
    finally:
        trainer.saver.close()
        trainer.source.close()
        if trainer.samples is not None:
            trainer.samples.close()
    trainer.observer.close()
    enter("export")
    on_main(lambda: _export(cfg, folders, trainer.steps))
    reporter.say(f"distilled student: {run_dir / 'student'}")


@dataclass(frozen=True)
class TrainingEngine:
    """The DeepSpeed engine around the student, and its weights and optimiser state as a checkpoint has them."""

    engine: Any
    state: ZeroState


@dataclass(frozen=True)
class Session:
    """One rank, ready to train from `start`."""

    trainer: Trainer
    student: StudentModule
    start: LoaderState


def open_session(cfg: Config, folders: Folders, reporter: Reporter) -> Session:
    """Everything up to the first step, which follows the newest complete checkpoint if there is one. Collective."""
    setup = join(cfg, folders.run, reporter)
    models = load(cfg, folders, setup)
    if (attention := choice_for(models.student.model, setup.device)) is not None:
        reporter.say(attention.in_words())
    if setup.compiled:
        reporter.say("layers are compiled when they first run, which takes a minute or so (distill.compile)")
    compare_teachers(cfg, folders, models.source, setup.device, reporter)
    engine = build(cfg, folders, setup, models)
    return resume(cfg, folders, setup, models, engine, reporter)


def join(cfg: Config, run_dir: Path, reporter: Reporter) -> RankSetup:
    """Join the process group and settle device, dtype and ZeRO stage; no model is touched.

    Raises ConfigError for what this machine or this group cannot do.
    """
    obstacle = try_launch(cfg)
    device = rank_device(cfg.runtime.device)
    # the ranks that share this machine's cores, of which a job on several machines has fewer than ranks
    set_threads(cfg.runtime.threads, int(os.environ.get("LOCAL_WORLD_SIZE", cfg.distill.processes)))
    check_machine(cfg.distill.zero, device.type)
    check_eight_bits(cfg.distill.teacher_dtype, device)
    library_log = run_dir / "logs" / ("distill.log" if is_main() else f"distill-rank-{rank()}.log")
    with quiet(library_log):
        join_group(device, group_timeout(cfg))
        can_nvme = cfg.distill.zero.nvme_path is None or has_async_io()
    if not can_nvme:
        hint = "install libaio's headers (libaio-dev), a C++ compiler and ninja, or offload to cpu"
        raise ConfigError("distill.zero.nvme_path", expected="DeepSpeed's async_io, which it builds", hint=hint)
    check_world(cfg.distill.processes)
    obstacle = agree_on_backend(obstacle)
    _note_backend(obstacle, run_dir, reporter)
    compile_ = "off" if cfg.distill.fake_quantize else cfg.distill.compile  # a compiler's rounding is not the grid's
    compiled, why_not = agree_on_compiling(compile_, device, obstacle)
    if why_not is not None:
        reporter.say(f"  note: layers are not compiled: {why_not}")
    torch.manual_seed(cfg.seed)
    dtype = agreed_dtype(cfg.distill.dtype, device)
    for notice in slow_products(device, dtype):
        reporter.say(f"note: {notice}")
    stage = _exact_stage(cfg.distill.zero_stage, dtype, reporter)
    settings = deepspeed_config(cfg.distill, stage, bf16=dtype == torch.bfloat16, device=device.type)
    return RankSetup(device, dtype, stage, settings, library_log, compiled)


def _note_backend(obstacle: str | None, run_dir: Path, reporter: Reporter) -> None:
    """Say and keep, for the report, that the kernels run in torch; forget it when they no longer have to."""
    note = run_dir / KERNELS.path
    if obstacle is not None:
        reporter.say(f"  note: the kernels run in torch on all ranks: {obstacle}")
    if is_main() and obstacle is not None:
        files.write_json(note, {"obstacle": obstacle})
    elif is_main():
        note.unlink(missing_ok=True)


def load(cfg: Config, folders: Folders, setup: RankSetup) -> Models:
    """The source of targets and the student, see load_models.load. A collective call."""
    enter("load")
    with quiet(setup.library_log):
        return load_models.load(cfg, folders, setup)


def build(cfg: Config, folders: Folders, setup: RankSetup, models: Models) -> TrainingEngine:
    """The engine, with fp32 master weights that have every digit on disk. A collective call.

    Raises CheckpointError when the student could not be exported after training, SelfCheckError when DeepSpeed changed
    the dtype of a buffer.
    """
    enter("initialise")
    teacher, student = models.source.model, models.student
    before = buffer_dtypes(teacher=teacher, student=student)
    with quiet(setup.library_log):
        engine = make_engine(cfg, student, setup.zero_stage, setup.deepspeed, models.slices)
        check_buffers_kept(before, buffer_dtypes(teacher=teacher, student=student))
        state = ZeroState(engine, student.model, models.slices, student.helpers(), models.average)
        pruned = Checkpoint.open(folders.student)
        if cfg.distill.lora is not None:
            AdaptersOnDisk(pruned, cfg.distill.lora, state.model_shapes)
        else:
            trained = trained_tensors(pruned, state.model_shapes, state.tied)
            if setup.dtype == torch.bfloat16:
                state.restore_precision(pruned, trained)
    return TrainingEngine(engine, state)


def resume(
    cfg: Config, folders: Folders, setup: RankSetup, models: Models, engine: TrainingEngine, reporter: Reporter
) -> Session:
    """The trainer, with weights, optimiser state and position of the newest complete checkpoint. A collective call.

    Raises RunFolderError on a checkpoint of another run.
    """
    fingerprint = _fingerprint(cfg, folders, setup, models.student.objectives.entries)
    latest = checkpoint_folder.find_latest(folders.checkpoints, fingerprint)
    for note in latest.notes:
        reporter.say(note)
    trainer = _make_trainer(cfg, folders, setup, models, engine, fingerprint, latest.step, reporter)
    start = LoaderState()
    if latest.path is not None:
        with quiet(setup.library_log):
            _load_checkpoint(engine.state, latest.path, latest.manifest)
        start = trainer.restore(latest.manifest["state"])
        rearranged = _rearranged(latest.manifest, setup.zero_stage, cfg.distill.tensor_parallel)
        reporter.say(f"going on from step {start.step} of {trainer.steps} ({latest.path}{rearranged})")
    return Session(trainer, models.student, start)


def _exact_stage(stage: int, dtype: torch.dtype, reporter: Reporter) -> int:
    """The ZeRO stage to run: in bf16 DeepSpeed silently makes a dummy Adam step at stage 0, but not at stage 1."""
    if stage == 0 and dtype == torch.bfloat16:
        reporter.say("distill.zero_stage 0 is not exact in bfloat16: stage 1 is used")
        return 1
    return stage


def make_engine(
    cfg: Config, student: StudentModule, stage: int, settings: dict[str, Any], slices: ModelSlices | None
) -> Any:
    """DeepSpeed's engine around the student; `settings` is its config. A collective call."""
    import deepspeed

    group = None
    if slices is not None:
        group = slices.head.group
        setattr(student, "ds_autotp_parsed", True)  # noqa: B010 - DeepSpeed need not split what is split
    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=make_optimizer(student, cfg.distill.optimizer, stage, group),
        config=settings,
        dist_init_required=False,
    )
    if slices is not None:
        engine.first_dataloader_check.remove()  # cannot compare dataclasses; the vocab-parallel loss compares calls
    return engine


def _bad_gradient(student: StudentModule) -> str:
    """The parameter nearest to the loss whose accumulated gradient is not finite, or ""."""
    from deepspeed.utils import safe_get_full_grad

    bad = ""
    for name, parameter in student.trained_parameters():  # at stage 3 every call is collective
        grad = safe_get_full_grad(parameter)
        grad = parameter.grad if grad is None else grad
        if grad is not None and not bool(torch.isfinite(grad).all()):
            bad = name
    return bad


def _load_checkpoint(state: ZeroState, path: Path, manifest: dict[str, Any]) -> None:
    """Load this rank's part of a checkpoint that any number of ranks wrote at any stage. A collective call."""
    held = checkpoint_folder.data_files(path, manifest)
    index = RankFileIndex(held, manifest["parameters"], quantities_of(manifest))
    if index.shapes != state.shapes:
        raise CheckpointError(f"{path}", expected="the student's parameters", got="others")
    with RankFileReader(index) as reader:
        state.load(reader.fill, manifest["adam_step"])


def _rearranged(manifest: dict[str, Any], stage: int, tensor: int) -> str:
    """For the message on a checkpoint that another arrangement of ranks wrote."""
    before = _arrangement(manifest["ranks"], manifest["zero_stage"], manifest.get("tensor_parallel", 1))
    now = _arrangement(world_size(), stage, tensor)
    return "" if before == now else f", written by {before}, now {now}"


def _arrangement(ranks: int, stage: int, tensor: int) -> str:
    return f"{ranks} ranks at ZeRO {stage}" + (f" with {tensor} a layer" if tensor > 1 else "")


def _export(cfg: Config, folders: Folders, step: int) -> None:
    """Write the finished student from the last checkpoint; on rank 0 only."""
    path = checkpoint_folder.step_dir(folders.checkpoints, step)
    manifest = checkpoint_folder.verify(path, weights_only=True)
    export_checkpoint(
        path, manifest, folders.student, folders.run / "student", card=student_card(cfg, manifest, folders.student),
        max_shard_bytes=cfg.prune.max_shard_bytes, code=cfg.teacher.trust_remote_code, lora=cfg.distill.lora,
        adapter_dir=folders.run / ADAPTER.path,
    )  # fmt: skip


def _fingerprint(cfg: Config, folders: Folders, setup: RankSetup, entries: Sequence[ObjectiveConfig]) -> dict[str, Any]:
    """What a checkpoint depends on, by name, so that a refusal can say what differs. On rank 0 only."""
    if not is_main():
        return {}
    settled = [entry.model_dump(mode="json") for entry in entries if entry.matches_layers]
    own = cfg.distill.own_text
    teachers, several = teacher_folders(cfg, folders.teacher), bool(cfg.distill.teachers)
    return {
        **({"layers": settled} if settled else {}),
        **({"prompts": Prompts(own).digests()} if own is not None and own.prompts else {}),
        **({"pairs": Pairs(pairs).digests()} if (pairs := cfg.distill.preferences) and pairs.pairs else {}),
        "distill": {**cfg.decisive_for_student(), "dtype": str(setup.dtype).removeprefix("torch.")},
        "seed": cfg.seed,
        "device": setup.device.type,
        "teacher": checkpoint_identity(folders.teacher),
        "student": {f.name: files.sha256_file(f) for f in sorted(folders.student.glob("*.safetensors"))}
        | {"config": files.sha256_file(folders.student / "config.json")},
        "data": files.sha256_file(folders.data / "manifest.json"),
        **({"teachers": {name: checkpoint_identity(path) for name, path in teachers.items()}} if several else {}),
    }


def _make_trainer(
    cfg: Config,
    folders: Folders,
    setup: RankSetup,
    models: Models,
    built: TrainingEngine,
    fingerprint: dict[str, Any],
    step: int,
    reporter: Reporter,
) -> Trainer:
    """The trainer of a run that goes on after `step` steps."""
    settings, store, mesh = cfg.distill, TokenStore.open(folders.data), Mesh.of(cfg.distill)
    make_loader = partial(
        PackedLoader,
        store.split("train"),
        settings.seq_len,
        settings.global_batch,
        settings.micro_batch,
        cfg.seed,
        rank=mesh.data_rank,
        world=mesh.data,
        label_slice=(mesh.sequence_rank, mesh.sequence),
        choose_labels=models.choose_labels,
        shorter_first=shorter_phases(settings),
        task=task_of(settings.objectives, settings.masking),
    )
    samples = open_samples(cfg, folders, setup, models.student, built.state.tied, make_loader().sequence, reporter.say)
    loader = make_loader(own=samples)
    held_out = held_out_batches(store.split("heldout"), settings, models.choose_labels)
    saver = Saver(
        folders.checkpoints,
        built.state,
        {"fingerprint": fingerprint, "zero_stage": setup.zero_stage, "tensor_parallel": settings.tensor_parallel},
        SavePolicy(settings.keep_checkpoints, settings.keep_every, settings.async_checkpoints),
        setup.device,
    )
    observer = make_observer(
        cfg, loader, teacher_dir=folders.teacher, student_dir=folders.student, run_dir=folders.run,
        device=setup.device, dtype=setup.dtype, step=step, reporter=reporter,
    )  # fmt: skip
    return Trainer(
        cfg=settings,
        engine=built.engine,
        source=models.source,
        objectives=models.student.objectives,
        loader=loader,
        validator=Validator(held_out, models.source, setup.device, mesh, models.average is None, samples),
        samples=samples,
        average=models.average,
        device=setup.device,
        steps=total_steps(settings.tokens, settings.seq_len, settings.global_batch),
        saver=saver,
        seed=cfg.seed,
        bad_gradient=lambda: _bad_gradient(built.engine.module),
        observer=observer,
        reporter=reporter,
        host_sums=HostSums(group_timeout(cfg)),
    )
