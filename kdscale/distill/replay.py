"""Runs one step of a finished or running distillation again: alone, in one process, without touching the run.

The newest checkpoint before the step is loaded, the steps in between are trained again, then the whole global batch of
the step runs forward and backward, and the optimiser does nothing. All that a run would write goes to a temporary
folder.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdscale.config.distill.targets import TEACHER_TOKEN
from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.config.telemetry import ProfileConfig, SpikeConfig, TrackingConfig
from kdscale.data.batches import PackedLoader
from kdscale.data.token_store import TokenStore
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.engine import Session, open_session
from kdscale.distill.load_models import Folders
from kdscale.distill.schedule import seed_step, total_steps
from kdscale.distill.step import StudentModule, to_device, train_step
from kdscale.distill.telemetry.clock import Clock
from kdscale.distill.trainer import Trainer
from kdscale.errors import ConfigError, RunFolderError
from kdscale.families import load_family
from kdscale.files import explain_os_errors, write_json
from kdscale.models.loading import load_tokenizer
from kdscale.models.lora.adapters import adapted_weight
from kdscale.runs.folder import METRICS, ON_POLICY, TARGETS, RunFolder
from kdscale.runs.lineage import distilled_from
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import rank
from kdscale.weights import read_config, resolve_teacher

_SHOWN_TOKENS = 48  # of a text


def replay_step(
    folder: Path, step: int, *, overrides: Sequence[str], max_steps: int, nearest: bool, reporter: Reporter
) -> tuple[dict[str, Any], Path]:
    """Run one training step of the run in `folder` again; returns the result and the file it is written to.

    It writes nothing else there and takes no lock, so the run may go on meanwhile. Raises RunFolderError when the
    folder is no run or has not begun to distil, and what `replay` raises.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        raise RunFolderError(f"{folder} is not a run folder", expected="a folder with config.yaml")
    config = load_config(run.config, overrides)
    for needed in (run.pruned / "config.json", run.data / "manifest.json"):
        if not needed.exists():
            raise RunFolderError(f"{folder}: no step was trained yet", expected=str(needed), got="no such file")
    teacher = distilled_from(run, config, resolve_teacher(config.teacher))
    folders = Folders(teacher, run.pruned, run.data, run.path)
    result = replay(config, folders, step, max_steps=max_steps, nearest=nearest, reporter=reporter)
    file = run.path / "replay" / f"step-{step}.json"
    with explain_os_errors(file):
        file.parent.mkdir(exist_ok=True)
        write_json(file, result)
    return result, file


def replay(
    cfg: Config, folders: Folders, step: int, *, max_steps: int, nearest: bool, reporter: Reporter
) -> dict[str, Any]:
    """Run step `step` (counted from 1, as in metrics.jsonl) again; returns JSON values. `folders.run` is only read.

    With `nearest` the step runs on the weights of the nearest checkpoint before it, without training up to it. Raises
    ConfigError when there is no such step, or when more than `max_steps` steps lie between checkpoint and step.
    """
    steps = total_steps(cfg.distill.tokens, cfg.distill.seq_len, cfg.distill.global_batch)
    if not 1 <= step <= steps:
        raise ConfigError("--step", expected=f"1 to {steps}, the steps of this run", got=str(step))
    start = find_start(folders.checkpoints, step)
    _check_distance(start.step, step, max_steps, nearest)
    with tempfile.TemporaryDirectory(prefix="kdscale-replay-") as scratch:
        session = _open_alone(cfg, folders, start, Path(scratch), reporter)
        trainer = session.trainer
        try:
            # a damaged checkpoint is skipped, so the loaded one may be older
            _check_distance(session.start.step, step, max_steps, nearest)
            if not nearest and session.start.step < step - 1:
                reporter.say(f"training again: steps {session.start.step + 1} to {step - 1}")
                trainer.advance(session.start, step - 1)
            if trainer.samples is not None:
                trainer.samples.prepare(step - 1)
            sequences = _sequence_losses(trainer, step)
            figures = _run_step(session, step, parameter_groups(folders.student))
        finally:
            trainer.source.close()
            trainer.observer.close()
    weights_of = session.start.step if nearest else step - 1
    return {
        "step": step,
        "weights_of_step": weights_of,
        "of_this_step": weights_of == step - 1,
        "checkpoint_step": session.start.step,
        "processes_of_run": cfg.distill.processes,
        **_compare_with_log(figures["loss"], folders.run / METRICS.path, step),
        **figures,
        "sequences": _add_texts(sequences, cfg, folders, trainer.loader.at(step - 1), step - 1),
        "losses": [term.name for term in cfg.distill.columns if term.unit != "fraction"],
    }


@dataclass(frozen=True)
class StartPoint:
    """Where a replay begins: after step `step`, from `checkpoint` or (None) from the pruned student."""

    checkpoint: Path | None
    step: int


def find_start(checkpoints: Path, step: int) -> StartPoint:
    """The newest sealed checkpoint that was written before `step` (counted from 1) was trained."""
    for path in checkpoint_folder.sealed_checkpoints(checkpoints):
        if (checkpoint_step := checkpoint_folder.step_of(path)) < step:
            return StartPoint(path, checkpoint_step)
    return StartPoint(None, 0)


def _check_distance(begin: int, step: int, max_steps: int, nearest: bool) -> None:
    between = step - 1 - begin
    if between > max_steps and not nearest:
        raise ConfigError(
            f"--step {step}",
            expected=f"at most {max_steps} steps after a checkpoint",
            got=f"{between} steps after the nearest one, which is of step {begin}",
            hint=f"--max-steps {between} trains them again; --from-checkpoint-only runs the batch on the weights of "
            f"step {begin}",
        )


def _open_alone(cfg: Config, folders: Folders, start: StartPoint, scratch: Path, reporter: Reporter) -> Session:
    """Open a session as the run does, but with one rank, and with `scratch` as the run folder.

    The checkpoint to begin from and stored targets are linked into it.
    """
    (scratch / "checkpoints").mkdir()
    if start.checkpoint is not None:
        (scratch / "checkpoints" / start.checkpoint.name).symlink_to(start.checkpoint.resolve())
    if (stored := folders.run / TARGETS.path).exists():
        (scratch / TARGETS.path).symlink_to(stored.resolve())
    if (written := folders.run / ON_POLICY.path).exists():  # a copy: a step that was not trained yet writes to it
        shutil.copytree(written, scratch / ON_POLICY.path)
    served = cfg.distill.served
    if served.token_file is None:
        served = served.model_copy(update={"token_file": str(folders.run / TEACHER_TOKEN)})
    one_rank = {"processes": 1, "sequence_parallel": 1, "tensor_parallel": 1}
    no_extras = {"spikes": SpikeConfig(enabled=False), "profile": ProfileConfig(), "served": served}
    distill = cfg.distill.model_copy(update={**one_rank, **no_extras})
    alone = cfg.model_copy(update={"distill": distill, "tracking": TrackingConfig()})
    return open_session(alone, replace(folders, run=scratch), reporter)


@torch.no_grad()
def _sequence_losses(trainer: Trainer, step: int) -> list[dict[str, Any]]:
    """The losses of each sequence on its own, in the global order."""
    out = []
    trainer.engine.eval()
    loader = trainer.loader.at(step - 1)
    for about in loader.describe(step - 1):
        batch = loader.stack([about["number"]], step - 1)
        micro_batch = to_device(batch, trainer.device)
        _, figures = trainer.engine(micro_batch, trainer.source.targets(micro_batch))
        counts = trainer.objectives.counts_of([batch])
        means = trainer.objectives.means([*map(float, counts), *figures.tolist()], step - 1)
        out.append({**about, **{name: _finite_or_none(means[name]) for name in trainer.objectives.columns}})
    trainer.engine.train()
    return out


def _run_step(session: Session, step: int, groups: Mapping[str, str]) -> dict[str, Any]:
    """Run the step as it was, without the update: losses, gradient norms by group of parameters."""
    trainer = session.trainer
    batches = trainer.loader.step(step - 1)
    seed_step(trainer.seed, step - 1, rank())
    totals = train_step(
        trainer.engine, trainer.source, batches, trainer.device, Clock(trainer.device), update=False
    ).tolist()
    norms = _gradient_norms(session.student, groups)
    return {
        **{name: _finite_or_none(value) for name, value in trainer.objectives.means(totals, step - 1).items()},
        "labels": int(totals[0]),
        "grad_norm": _finite_or_none(math.sqrt(sum(norm * norm for norm in norms.values()))),
        "gradient_clipping": trainer.cfg.optimizer.gradient_clipping,
        "gradient_norms": {name: _finite_or_none(norm) for name, norm in norms.items()},
    }


def parameter_groups(model_dir: Path) -> dict[str, str]:
    """Parameter → group, such as `layer 3 ffn`; what is in no layer is a group by its module's name."""
    config = read_config(model_dir)
    specs = load_family(config, str(model_dir / "config.json")).tensors(config).values()
    return {
        spec.parameter: spec.parameter.split(".")[-2] if spec.layer is None else f"layer {spec.layer} {spec.component}"
        for spec in specs
    }


def _gradient_norms(student: StudentModule, groups: Mapping[str, str]) -> dict[str, float]:
    """Euclidean norm of the accumulated gradient, before clipping, by group, largest first."""
    from deepspeed.utils import safe_get_full_grad

    squares: dict[str, float] = defaultdict(float)
    for name, parameter in student.trained_parameters():
        grad = safe_get_full_grad(parameter)  # DeepSpeed keeps gradients in buffers of its own
        grad = parameter.grad if grad is None else grad
        if grad is not None:
            weight = adapted_weight(name)
            squares[groups.get(weight, weight)] += float(grad.double().square().sum())
    norms = {name: math.sqrt(value) if value >= 0 else math.nan for name, value in squares.items()}
    return dict(sorted(norms.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf))


def _compare_with_log(loss: float | None, metrics: Path, step: int) -> dict[str, Any]:
    """What the log says of the step, and whether the replay's loss has the same bits; None where it says nothing."""
    rows = [row for row in read_metrics(metrics) if row["kind"] == "train" and row["step"] == step]
    logged = rows[-1] if rows else {}
    same = loss == logged["loss"] if "loss" in logged else None
    return {"logged_loss": logged.get("loss"), "logged_grad_norm": logged.get("grad_norm"), "same_bits": same}


def _add_texts(
    sequences: list[dict[str, Any]], cfg: Config, folders: Folders, loader: PackedLoader, step: int
) -> list[dict[str, Any]]:
    """Add the beginning of each sequence and of each of its documents, as text."""
    tokenizer = load_tokenizer(folders.student, cfg.teacher.trust_remote_code)
    split = TokenStore.open(folders.data).split("train")

    def beginning(ids: Any) -> str:
        return str(tokenizer.decode([int(i) for i in ids[:_SHOWN_TOKENS]]))

    def document(number: int, source: str) -> dict[str, Any]:
        ids = split.document_tokens(number)
        return {"id": number, "source": source, "tokens": len(ids), "text": beginning(ids)}

    return [
        {
            **{key: value for key, value in entry.items() if key not in ("documents", "sources")},
            "text": beginning(loader.stack([entry["number"]], step).input_ids_BS[0]),
            "documents": list(map(document, entry["documents"], entry["sources"])),
        }
        for entry in sequences
    ]


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
