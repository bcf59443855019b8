"""Distillation on DeepSpeed: start the group, build teacher, student and engine, train, export.

Only this file and zero3.py import deepspeed, and only when a run starts. A single CPU process is the smallest cluster:
it runs the same code as a rank started by a launcher under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdscale import files
from kdscale.config.root import Config
from kdscale.data.batches import LoaderState, PackedLoader
from kdscale.data.heldout import eval_batches
from kdscale.data.token_store import TokenStore
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint.rank_files import RankFileIndex, RankFileReader
from kdscale.distill.checkpoint.saver import SavePolicy, Saver
from kdscale.distill.checkpoint.zero_state import ZeroState
from kdscale.distill.export import export_checkpoint
from kdscale.distill.load_models import load_pair
from kdscale.distill.optimizer import make_optimizer
from kdscale.distill.parallel.deepspeed_config import check_machine, deepspeed_config
from kdscale.distill.parallel.mesh import Mesh
from kdscale.distill.parallel.tensor_parallel import ModelSlices
from kdscale.distill.schedule import total_steps
from kdscale.distill.step import StudentModule
from kdscale.distill.telemetry.observer import Observer, make_observer
from kdscale.distill.trainer import Trainer
from kdscale.distill.validate import Validator
from kdscale.errors import CheckpointError, ConfigError
from kdscale.models.parameter_map import trained_tensors
from kdscale.packaging.model_card import card_facts, model_card
from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads
from kdscale.runtime.library_output import quiet
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import barrier, is_main, on_main, rank, world_size
from kdscale.runtime.timeouts import group_timeout
from kdscale.teacher.source import Teacher
from kdscale.weights import Checkpoint, checkpoint_identity
from kdscale_launch.watchdog import enter


def run(
    cfg: Config, *, teacher_dir: Path, student_dir: Path, data_dir: Path, run_dir: Path, reporter: Reporter
) -> None:
    """Distil `teacher_dir` into `student_dir`'s model; the result is `run_dir`/student.

    Goes on from the newest whole checkpoint in `run_dir`/checkpoints. Raises Interrupted (after saving) on SIGINT and
    SIGTERM, TrainingError when steps keep being non-finite, RunFolderError on a checkpoint of another run.
    """
    reporter = reporter if is_main() else Reporter(quiet=True)
    session = open_session(
        cfg, teacher_dir=teacher_dir, student_dir=student_dir, data_dir=data_dir, run_dir=run_dir, reporter=reporter
    )
    trainer = session.trainer
    try:
        trainer.train(session.start)
    except BaseException as error:
        trainer.observer.close(error)
        raise
    finally:
        trainer.saver.close()
        trainer.teacher.close()
    trainer.observer.close()
    enter("export")
    on_main(lambda: _export(cfg, run_dir / "checkpoints", trainer.steps, student_dir, run_dir / "student"))
    reporter.say(f"distilled student: {run_dir / 'student'}")


@dataclass(frozen=True)
class Session:
    """One rank, ready to train from `start`: group, models, engine and checkpoint are loaded."""

    trainer: Trainer
    student: StudentModule
    start: LoaderState


def open_session(
    cfg: Config, *, teacher_dir: Path, student_dir: Path, data_dir: Path, run_dir: Path, reporter: Reporter
) -> Session:
    """Join the group and load everything, from the newest whole checkpoint in `run_dir`/checkpoints if there is one."""
    device = resolve_device(cfg.runtime.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # the ranks that share this machine's cores, of which a job on several machines has fewer than ranks
    set_threads(cfg.runtime.threads, int(os.environ.get("LOCAL_WORLD_SIZE", cfg.distill.processes)))
    check_machine(cfg.distill.zero, device.type)
    log_path = run_dir / "logs" / ("distill.log" if is_main() else f"distill-rank-{rank()}.log")
    with quiet(log_path):
        _start_group(device, group_timeout(cfg))
        can_nvme = cfg.distill.zero.nvme_path is None or _has_async_io()
    if not can_nvme:
        hint = "install libaio's headers (libaio-dev), a C++ compiler and ninja, or offload to cpu"
        raise ConfigError("distill.zero.nvme_path", expected="DeepSpeed's async_io, which it builds", hint=hint)
    _check_world(cfg)
    torch.manual_seed(cfg.seed)
    dtype = resolve_dtype(cfg.distill.dtype, device)
    stage = _stage(cfg.distill.zero_stage, dtype, reporter)
    zero = deepspeed_config(cfg.distill, stage, bf16=dtype == torch.bfloat16, device=device.type)
    enter("load")
    with quiet(log_path):
        teacher, student, split = load_pair(
            cfg, teacher_dir, student_dir, run_dir, dtype, device, zero if stage == 3 else None
        )
    enter("initialise")
    with quiet(log_path):
        engine = _make_engine(cfg, student, stage, zero, split)
        fragments = ZeroState(engine, student.model, split)
        source = Checkpoint.open(student_dir)
        trained = trained_tensors(source, fragments.shapes, fragments.tied)  # before any work: all can be exported
        if dtype == torch.bfloat16:
            fragments.restore_precision(source, trained)
    checkpoints = run_dir / "checkpoints"
    fingerprint = _fingerprint(cfg, dtype, device, teacher_dir, student_dir, data_dir)
    found = checkpoint_folder.find_latest(checkpoints, fingerprint)
    for note in found.notes:
        reporter.say(note)
    rules = SavePolicy(cfg.distill.keep_checkpoints, cfg.distill.keep_every, cfg.distill.async_checkpoints)
    saver = Saver(
        checkpoints,
        fragments,
        {"fingerprint": fingerprint, "zero_stage": stage, "tensor_parallel": cfg.distill.tensor_parallel},
        rules,
        device,
    )
    observer = partial(
        make_observer, cfg, teacher_dir=teacher_dir, student_dir=student_dir, run_dir=run_dir, device=device,
        dtype=dtype, step=found.step, reporter=reporter,
    )  # fmt: skip
    trainer = _make_trainer(cfg, engine, teacher, data_dir, run_dir, device, saver, reporter, observer)
    start = LoaderState()
    if found.path is not None:
        with quiet(log_path):
            _load(fragments, found.path, found.manifest)
        start = trainer.restore(found.manifest["state"])
        rearranged = _rearranged(found, stage, cfg.distill.tensor_parallel)
        reporter.say(f"going on from step {start.step} of {trainer.steps} ({found.path}{rearranged})")
    return Session(trainer, student, start)


def shutdown() -> None:
    """Leave the process group; call at the end of a process, then leave it with os._exit.

    A plain exit was seen to abort ("terminate called without an active exception") now and then after all was done.
    """
    if dist.is_initialized():
        import deepspeed

        barrier()
        deepspeed.comm.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


def _start_group(device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the launcher's group, or make one of a single process that needs no port."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops

    # On a CPU DeepSpeed would compile an extension at every start: a minute, a compiler, a lock that outlives a kill.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # A launcher says all three; job systems and other libraries leave a stray RANK behind.
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")
            store = torch._C._distributed_c10d.HashStore()  # in memory: no port, nothing to collide with
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def _check_world(cfg: Config) -> None:
    if world_size() != cfg.distill.processes:
        raise ConfigError(
            "distill.processes",
            expected=f"{cfg.distill.processes} processes",
            got=f"{world_size()} in the group (WORLD_SIZE)",
            hint="start as many ranks as the config says",
        )


def _stage(stage: int, dtype: torch.dtype, reporter: Reporter) -> int:
    """bf16 at stage 0 makes a dummy Adam step in DeepSpeed, in silence: stage 1 is the same thing done right."""
    if stage == 0 and dtype == torch.bfloat16:
        reporter.say("distill.zero_stage 0 is not exact in bfloat16: stage 1 is used")
        return 1
    return stage


def _make_engine(
    cfg: Config, student: StudentModule, stage: int, zero: dict[str, Any], split: ModelSlices | None
) -> Any:
    import deepspeed

    group = None
    if split is not None:
        group = split.head.group
        setattr(student, "ds_autotp_parsed", True)  # noqa: B010 - DeepSpeed need not split what is split

    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=make_optimizer(student, cfg.distill.optimizer, stage, group),
        config=zero,
        dist_init_required=False,
    )
    if split is not None:
        engine.first_dataloader_check.remove()  # cannot compare dataclasses; the vocab-parallel loss compares calls
    return engine


def _bad_gradient(model: Any) -> str:
    """The parameter nearest to the loss whose accumulated gradient is not finite, or ""."""
    from deepspeed.utils import safe_get_full_grad

    bad = ""
    for name, parameter in model.named_parameters():  # all of them: at stage 3 every call is collective
        grad = safe_get_full_grad(parameter)
        grad = parameter.grad if grad is None else grad
        if grad is not None and not bool(torch.isfinite(grad).all()):
            bad = name
    return bad


def _load(fragments: ZeroState, path: Path, manifest: dict[str, Any]) -> None:
    """This rank's part of a checkpoint that was written by any number of ranks at any stage; a collective call."""
    index = RankFileIndex(checkpoint_folder.data_files(path, manifest), manifest["parameters"])
    if index.shapes != fragments.shapes:
        raise CheckpointError(f"{path}", expected="the student's parameters", got="others")
    with RankFileReader(index) as reader:
        fragments.load(reader.fill, manifest["adam_step"])


def _rearranged(found: checkpoint_folder.LatestCheckpoint, stage: int, tensor: int) -> str:
    """Said of a checkpoint that another arrangement of ranks wrote."""
    manifest = found.manifest
    before = _arrangement(manifest["ranks"], manifest["zero_stage"], manifest.get("tensor_parallel", 1))
    now = _arrangement(world_size(), stage, tensor)
    return "" if before == now else f", written by {before}, now {now}"


def _arrangement(ranks: int, stage: int, tensor: int) -> str:
    return f"{ranks} ranks at ZeRO {stage}" + (f" with {tensor} a layer" if tensor > 1 else "")


def _export(cfg: Config, checkpoints: Path, step: int, student_dir: Path, out_dir: Path) -> None:
    """The finished student, from the last checkpoint; rank 0 alone."""
    path = checkpoint_folder.step_dir(checkpoints, step)
    manifest = checkpoint_folder.verify(path, weights_only=True)
    card = model_card(card_facts(cfg, manifest))
    export_checkpoint(path, manifest, student_dir, out_dir, card=card, max_shard_bytes=cfg.prune.max_shard_bytes)


def _fingerprint(
    cfg: Config, dtype: torch.dtype, device: torch.device, teacher_dir: Path, student_dir: Path, data_dir: Path
) -> dict[str, Any]:
    """What a checkpoint depends on, by name, so that a refusal can say what differs. On rank 0 only."""
    if not is_main():
        return {}
    return {
        "distill": {**cfg.distill.decisive(), "dtype": str(dtype).removeprefix("torch.")},
        "seed": cfg.seed,
        "device": device.type,
        "teacher": checkpoint_identity(teacher_dir),
        "student": {f.name: files.sha256_file(f) for f in sorted(student_dir.glob("*.safetensors"))}
        | {"config": files.sha256_file(student_dir / "config.json")},
        "data": files.sha256_file(data_dir / "manifest.json"),
    }


def _make_trainer(
    cfg: Config,
    engine: Any,
    teacher: Teacher,
    data_dir: Path,
    run_dir: Path,
    device: torch.device,
    saver: Saver,
    reporter: Reporter,
    observer: Callable[[PackedLoader], Observer],
) -> Trainer:
    settings, store, mesh = cfg.distill, TokenStore.open(data_dir), Mesh.of(cfg.distill)
    loader = PackedLoader(
        store.split("train"),
        settings.seq_len,
        settings.global_batch,
        settings.micro_batch,
        cfg.seed,
        rank=mesh.data_rank,
        world=mesh.data,
        label_slice=(mesh.sequence_rank, mesh.sequence),
    )
    held_out = eval_batches(store.split("heldout"), settings.seq_len, settings.micro_batch, settings.validate_tokens)

    return Trainer(
        cfg=settings,
        engine=engine,
        teacher=teacher,
        loader=loader,
        validator=Validator(list(held_out), teacher, device, mesh),
        device=device,
        steps=total_steps(settings.tokens, settings.seq_len, settings.global_batch),
        saver=saver,
        seed=cfg.seed,
        bad_gradient=lambda: _bad_gradient(engine.module.model),
        observer=observer(loader),
        reporter=reporter,
    )
