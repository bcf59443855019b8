"""Distillation on DeepSpeed: start the group, build teacher, student and engine, train, export.

Only this file and zero3.py import deepspeed, and only when a run starts. A single CPU process is the smallest cluster:
it runs the same code as a rank started by a launcher under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdscale import files
from kdscale.config import Config
from kdscale.data.loader import LoaderState, PackedLoader, eval_batches
from kdscale.data.store import TokenStore
from kdscale.dist import barrier, is_main, rank, world_size
from kdscale.distill import state
from kdscale.distill.export import export_student, model_card
from kdscale.distill.loop import Trainer
from kdscale.distill.pair import load_pair, whole_shape
from kdscale.distill.quiet import quiet
from kdscale.distill.schedules import total_steps
from kdscale.distill.step import StudentModule
from kdscale.distill.validate import Validator
from kdscale.errors import CheckpointError, ConfigError
from kdscale.metrics import MetricsLog
from kdscale.models import resolve_device, resolve_dtype, set_threads
from kdscale.progress import Reporter
from kdscale.teacher import Teacher
from kdscale.weights import checkpoint_identity

_TAG = "deepspeed"


def run(
    cfg: Config, *, teacher_dir: Path, student_dir: Path, data_dir: Path, run_dir: Path, reporter: Reporter
) -> None:
    """Distil `teacher_dir` into `student_dir`'s model; the result is `run_dir`/student.

    Goes on from the newest whole checkpoint in `run_dir`/checkpoints. Raises Interrupted (after saving) on SIGINT and
    SIGTERM, TrainingError when steps keep being non-finite, RunFolderError on a checkpoint of another run.
    """
    device = resolve_device(cfg.runtime.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # the ranks that share this machine's cores, of which a job on several machines has fewer than ranks
    set_threads(cfg.runtime.threads, int(os.environ.get("LOCAL_WORLD_SIZE", cfg.distill.processes)))
    reporter = reporter if is_main() else Reporter(quiet=True)
    log_path = run_dir / "logs" / ("distill.log" if is_main() else f"distill-rank-{rank()}.log")
    with quiet(log_path):
        _start_group(device)
    _check_world(cfg)
    torch.manual_seed(cfg.seed)
    dtype = resolve_dtype(cfg.distill.dtype, device)
    stage = _stage(cfg.distill.zero_stage, dtype, reporter)
    zero3 = _deepspeed_config(cfg, stage, dtype, device) if stage == 3 else None
    with quiet(log_path):
        teacher, student = load_pair(cfg, teacher_dir, student_dir, run_dir, dtype, device, zero3)
    with quiet(log_path):
        engine = _make_engine(cfg, student, stage, dtype, device)
        if dtype == torch.bfloat16:
            _sharpen_masters(student.model, student_dir)
    fingerprint = _fingerprint(cfg, stage, dtype, device, teacher_dir, student_dir, data_dir)
    found = _find_checkpoint(run_dir / "checkpoints", fingerprint)
    for note in found.notes:
        reporter.say(note)
    trainer = _make_trainer(cfg, engine, teacher, data_dir, run_dir, device, fingerprint, found.step, reporter)
    start = LoaderState()
    if found.path is not None:
        with quiet(log_path):
            _load_engine(engine, found.path)
        start = trainer.restore(found.path)
        reporter.say(f"going on from step {start.step} of {trainer.steps} ({found.path})")
    try:
        trainer.train(start)
    finally:
        teacher.close()
        if trainer.metrics is not None:
            trainer.metrics.close()
    facts = _card_facts(cfg, trainer, dtype)
    export_student(
        student.model,
        student_dir,
        run_dir / "student",
        full_fp32=_full_fp32,
        card=model_card(facts),
        max_shard_bytes=cfg.prune.max_shard_bytes,
    )
    reporter.say(f"distilled student: {run_dir / 'student'}")


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


def _start_group(device: torch.device) -> None:
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
            dist.init_process_group(backend)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")
            store = torch._C._distributed_c10d.HashStore()  # in memory: no port, nothing to collide with
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


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


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips and skips as DeepSpeed's ZeRO optimisers do; stage 0 has neither norm nor check of its own."""

    overflow = False
    _global_grad_norm: torch.Tensor | float = 0.0

    def __init__(self, groups: Any, max_norm: float, **settings: Any):
        super().__init__(groups, **settings)
        self._max_norm = max_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        share = ((norm + 1e-6) / self._max_norm).clamp(min=1.0)
        for grad in grads:
            grad.div_(share)
        super().step(closure)


def _make_engine(cfg: Config, student: StudentModule, stage: int, dtype: torch.dtype, device: torch.device) -> Any:
    import deepspeed

    settings = cfg.distill.optimizer
    named = [item for item in student.named_parameters() if item[1].requires_grad]
    groups = [
        {"params": [p for _, p in named if len(whole_shape(p)) >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if len(whole_shape(p)) < 2], "weight_decay": 0.0},  # norms and biases
    ]
    adam: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": True}
    optimizer: torch.optim.Optimizer
    if stage == 0:
        optimizer = _GuardedAdamW(groups, settings.gradient_clipping, **adam)
    else:
        optimizer = torch.optim.AdamW(groups, **adam)
    engine, *_ = deepspeed.initialize(
        model=student,
        optimizer=optimizer,
        config=_deepspeed_config(cfg, stage, dtype, device),
        dist_init_required=False,
    )
    return engine


def _deepspeed_config(cfg: Config, stage: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    share = cfg.distill.micro_batch * cfg.distill.processes
    bucket = 500_000_000 if device.type == "cuda" else 50_000_000  # stage 2 and 3 allocate this many elements
    return {
        "train_micro_batch_size_per_gpu": cfg.distill.micro_batch,
        "gradient_accumulation_steps": cfg.distill.global_batch // share,
        # never left to DeepSpeed's silent default; at stage 0 our own optimiser clips
        "gradient_clipping": cfg.distill.optimizer.gradient_clipping if stage else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def _sharpen_masters(model: Any, student_dir: Path) -> None:
    """DeepSpeed makes the fp32 masters from bf16-rounded weights; put back the digits that the checkpoint has."""
    from deepspeed.utils import safe_set_full_fp32_param
    from safetensors import safe_open

    parameters = dict(model.named_parameters(remove_duplicate=False))
    for shard in sorted(student_dir.glob("*.safetensors")):
        with safe_open(str(shard), framework="pt") as stored:
            for name in sorted(stored.keys()):
                if name in parameters and stored.get_slice(name).get_dtype() == "F32":
                    safe_set_full_fp32_param(parameters[name], stored.get_tensor(name))


def _full_fp32(parameter: torch.Tensor) -> torch.Tensor:
    """The whole fp32 master weight of a parameter, gathered; the parameter itself where there is no master."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    return parameter.detach() if whole is None else whole


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


def _load_engine(engine: Any, path: Path) -> None:
    """DeepSpeed's own state, without running code that a checkpoint file could carry."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler]):
            loaded, _ = engine.load_checkpoint(str(path), tag=_TAG)
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    if loaded is None:
        raise CheckpointError(f"{path} could not be loaded", hint=f"remove {path} to go on from an earlier one")


def _find_checkpoint(folder: Path, fingerprint: dict[str, Any]) -> state.Found:
    """Rank 0 looks and decides; the others take its word, or its error."""
    answer: list[Any] = [None]
    if is_main():
        try:
            answer[0] = state.find(folder, fingerprint)
        except ValueError as error:  # every rank must raise it, or the others would wait for ever
            answer[0] = error
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _fingerprint(
    cfg: Config,
    stage: int,
    dtype: torch.dtype,
    device: torch.device,
    teacher_dir: Path,
    student_dir: Path,
    data_dir: Path,
) -> dict[str, Any]:
    """What a checkpoint depends on, by name, so that a refusal can say what differs. On rank 0 only."""
    if not is_main():
        return {}
    return {
        "distill": {**cfg.distill.decisive(), "zero_stage": stage, "dtype": str(dtype).removeprefix("torch.")},
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
    fingerprint: dict[str, Any],
    step: int,
    reporter: Reporter,
) -> Trainer:
    settings, store = cfg.distill, TokenStore.open(data_dir)
    loader = PackedLoader(
        store.split("train"),
        settings.seq_len,
        settings.global_batch,
        settings.micro_batch,
        cfg.seed,
        rank=rank(),
        world=world_size(),
    )
    held_out = eval_batches(store.split("heldout"), settings.seq_len, settings.micro_batch, settings.validate_tokens)
    logs = run_dir / "logs"

    def save_engine(tmp: Path) -> None:
        engine.save_checkpoint(str(tmp), tag=_TAG, save_latest=False)

    return Trainer(
        cfg=settings,
        engine=engine,
        teacher=teacher,
        loader=loader,
        validator=Validator(list(held_out), teacher, device),
        device=device,
        steps=total_steps(settings.tokens, settings.seq_len, settings.global_batch),
        run_dir=run_dir,
        fingerprint=fingerprint,
        save_engine=save_engine,
        bad_gradient=lambda: _bad_gradient(engine.module.model),
        metrics=MetricsLog(logs / "metrics.jsonl", step, logs / "tensorboard") if is_main() else None,
        reporter=reporter,
    )


def _card_facts(cfg: Config, trainer: Trainer, dtype: torch.dtype) -> dict[str, Any]:
    loss = cfg.distill.loss
    listed = "whole vocabulary" if loss.targets == "full" else f"teacher's top {loss.top_k}, tail: {loss.tail}"
    return {
        "teacher": Path(cfg.teacher.path).name,
        "training tokens": trainer.steps * trainer.step_tokens,
        "optimiser steps": trainer.steps,
        "sequence length": cfg.distill.seq_len,
        "sequences a step": cfg.distill.global_batch,
        "loss": f"{loss.ce_weight:g}·CE + {1 - loss.ce_weight:g}·T²·{loss.divergence}, T = {loss.temperature:g}, "
        f"{listed}",
        "learning rate": f"{cfg.distill.optimizer.lr:g} → {cfg.distill.optimizer.min_lr:g}, cosine",
        "computed in": f"{str(dtype).removeprefix('torch.')} with fp32 master weights",
        "skipped steps": trainer.guard.total,
        "seed": cfg.seed,
    }
