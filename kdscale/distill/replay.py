"""One step of a finished or running distillation again, alone, in one process and without touching the run.

The newest checkpoint before the step is loaded, the steps between are trained again, then the step's whole global batch
runs forward and backward and the optimiser does nothing. All that a run would write goes to a folder that is deleted.

Imports deepspeed for the gradients, which it keeps in buffers of its own.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale.config.load import load_config
from kdscale.config.objectives import log_columns
from kdscale.config.root import Config
from kdscale.config.targets import TEACHER_TOKEN
from kdscale.config.telemetry import ProfileConfig, SpikeConfig, TrackingConfig
from kdscale.data.batches import PackedLoader
from kdscale.data.token_store import TokenStore
from kdscale.distill import engine
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.engine import Session, open_session
from kdscale.distill.schedule import seed_step, total_steps
from kdscale.distill.step import to_device, train_step
from kdscale.distill.telemetry.clock import Clock
from kdscale.errors import ConfigError, RunFolderError
from kdscale.files import explain_os_errors, write_json
from kdscale.models.loading import load_tokenizer
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import rank
from kdscale.weights import resolve_teacher

_HEAD_TOKENS = 48  # of a text that is shown


_LAYER = re.compile(r"\.(\d+)\.")


_PARTS = (("norm", ("norm", "ln_")), ("attention", ("attn", "attention")), ("ffn", ("mlp", "feed_forward", "moe")))


@dataclass(frozen=True)
class Folders:
    """What a replay reads; `run` is never written to."""

    run: Path
    teacher: Path
    student: Path  # the pruned one that the run began from
    data: Path


@dataclass(frozen=True)
class Start:
    """Where a replay begins: after step `step`, from `checkpoint` or (None) from the pruned student."""

    checkpoint: Path | None
    step: int


def find_start(checkpoints: Path, step: int) -> Start:
    """The newest whole checkpoint that was written before `step` (counted from 1) was trained."""
    for path in checkpoint_folder.sealed_checkpoints(checkpoints):
        found = int(path.name.removeprefix("step-"))
        if found < step:
            return Start(path, found)
    return Start(None, 0)


def replay(
    cfg: Config, folders: Folders, step: int, *, max_steps: int, nearest: bool, reporter: Reporter
) -> dict[str, Any]:
    """Step `step` (counted from 1, as in metrics.jsonl) again; returns JSON values.

    With `nearest` the step runs on the weights of the nearest checkpoint before it, without training up to it. Raises
    ConfigError when there is no such step, or when more than `max_steps` steps lie between checkpoint and step.
    """
    steps = total_steps(cfg.distill.tokens, cfg.distill.seq_len, cfg.distill.global_batch)
    if not 1 <= step <= steps:
        raise ConfigError("--step", expected=f"1 to {steps}, the steps of this run", got=str(step))
    start = find_start(folders.run / "checkpoints", step)
    _check_distance(start.step, step, max_steps, nearest)
    with tempfile.TemporaryDirectory(prefix="kdscale-replay-") as scratch:
        session = _open(cfg, folders, start, Path(scratch), reporter)
        trainer = session.trainer
        try:
            # a damaged checkpoint is passed over, so the one that was loaded may be an earlier one
            _check_distance(session.start.step, step, max_steps, nearest)
            if not nearest and session.start.step < step - 1:
                reporter.say(f"training again: steps {session.start.step + 1} to {step - 1}")
                trainer.advance(session.start, step - 1)
            found = _examine(session, step)
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
        **_compared(found, folders.run / "logs" / "metrics.jsonl", step),
        **found,
        "sequences": _with_texts(found["sequences"], cfg, folders, trainer.loader),
    }


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


def _open(cfg: Config, folders: Folders, start: Start, scratch: Path, reporter: Reporter) -> Session:
    """The run's own start, with one rank and `scratch` as its run folder, in which the one checkpoint is a link."""
    (scratch / "checkpoints").mkdir()
    if start.checkpoint is not None:
        (scratch / "checkpoints" / start.checkpoint.name).symlink_to(start.checkpoint.resolve())
    served = cfg.distill.served
    if served.token_file is None:
        served = served.model_copy(update={"token_file": str(folders.run / TEACHER_TOKEN)})
    alone = {"processes": 1, "sequence_parallel": 1, "tensor_parallel": 1}
    quiet = {**alone, "spikes": SpikeConfig(enabled=False), "profile": ProfileConfig(), "served": served}
    one = cfg.model_copy(
        update={"distill": cfg.distill.model_copy(update=quiet), "tracking": TrackingConfig()}
    )  # fmt: skip
    return open_session(one, engine.Folders(folders.teacher, folders.student, folders.data, scratch), reporter)


def _examine(session: Session, step: int) -> dict[str, Any]:
    """Losses of every sequence on its own, then the step as it was: loss, gradient norms by parameter group."""
    trainer = session.trainer
    sequences = _sequence_losses(session, step)
    batches = trainer.loader.step(step - 1)
    seed_step(trainer.seed, step - 1, rank())
    totals = train_step(
        trainer.engine, trainer.source, batches, trainer.device, Clock(trainer.device), update=False
    ).tolist()
    groups = _gradient_norms(session.student.model)
    means = trainer.objectives.means(totals)
    return {
        **{name: _finite(value) for name, value in means.items()},
        "labels": int(totals[0]),
        "grad_norm": _finite(math.sqrt(sum(norm * norm for norm in groups.values()))),
        "gradient_clipping": trainer.cfg.optimizer.gradient_clipping,
        "gradient_norms": {name: _finite(norm) for name, norm in groups.items()},
        "sequences": sequences,
        "losses": [term.name for term in log_columns(trainer.cfg.objectives) if term.unit != "fraction"],
    }


@torch.no_grad()
def _sequence_losses(session: Session, step: int) -> list[dict[str, Any]]:
    """A forward for each sequence, in the global order."""
    trainer, out = session.trainer, []
    trainer.engine.eval()
    for about in trainer.loader.describe(step - 1):
        micro_batch = to_device(trainer.loader.stack([about["number"]]), trainer.device)
        _, figures = trainer.engine(micro_batch, trainer.source.targets(micro_batch))
        means = trainer.objectives.means([about["labels"], 1.0, *figures.tolist()])
        out.append({**about, **{name: _finite(means[name]) for name in trainer.objectives.columns}})
    trainer.engine.train()
    return out


def _gradient_norms(model: Any) -> dict[str, float]:
    """Euclidean norm of the accumulated gradient, before clipping, by layer and part of it, largest first."""
    from deepspeed.utils import safe_get_full_grad

    squares: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        grad = safe_get_full_grad(parameter)
        grad = parameter.grad if grad is None else grad
        if grad is not None:
            squares[parameter_group(name)] += float(grad.double().square().sum())
    norms = {name: math.sqrt(value) if value >= 0 else math.nan for name, value in squares.items()}
    return dict(sorted(norms.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf))


def parameter_group(name: str) -> str:
    """`layer 3 ffn` for model.layers.3.mlp.up_proj.weight; what is in no layer keeps its module's name."""
    layer = _LAYER.search(name)
    if layer is None:
        return name.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    part = next((part for part, marks in _PARTS if any(mark in name for mark in marks)), "other")
    return f"layer {layer.group(1)} {part}"


def _compared(found: dict[str, Any], metrics: Path, step: int) -> dict[str, Any]:
    """What the log says of the step, and whether the replay's loss has the same bits; None where it says nothing."""
    rows = [row for row in read_metrics(metrics) if row["kind"] == "train" and row["step"] == step]
    logged = rows[-1] if rows else {}
    same = found["loss"] == logged["loss"] if "loss" in logged else None
    return {"logged_loss": logged.get("loss"), "logged_grad_norm": logged.get("grad_norm"), "same_bits": same}


def _with_texts(
    sequences: list[dict[str, Any]], cfg: Config, folders: Folders, loader: PackedLoader
) -> list[dict[str, Any]]:
    """The beginning of each sequence and of each of its documents, as text."""
    tokenizer = load_tokenizer(folders.student, cfg.teacher.trust_remote_code)
    split = TokenStore.open(folders.data).split("train")

    def head(ids: Any) -> str:
        return str(tokenizer.decode([int(i) for i in ids[:_HEAD_TOKENS]]))

    out = []
    for item in sequences:
        documents = [
            {
                "id": number,
                "source": source,
                "tokens": len(split.document_tokens(number)),
                "text": head(split.document_tokens(number)),
            }
            for number, source in zip(item["documents"], item["sources"], strict=True)
        ]
        rest = {key: value for key, value in item.items() if key not in ("documents", "sources")}
        out.append({**rest, "text": head(loader.sequence(item["number"]).input_ids_S), "documents": documents})
    return out


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def replay_step(
    folder: Path, step: int, *, overrides: Sequence[str], max_steps: int, nearest: bool, reporter: Reporter
) -> tuple[dict[str, Any], Path]:
    """Run one training step of `folder` again; returns what was found and the file it is in.

    Writes nothing else there and takes no lock, so it may be called while the run goes on elsewhere. Raises
    RunFolderError when the folder is no run, or has not come to the distillation.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        raise RunFolderError(f"{folder} is not a run folder", expected="a folder with config.yaml")
    config = load_config(run.config, overrides)
    for part in (run.pruned / "config.json", run.data / "manifest.json"):
        if not part.exists():
            raise RunFolderError(f"{folder}: no step was trained yet", expected=str(part), got="no such file")
    teacher = distilled_from(run, config, resolve_teacher(config.teacher))

    found = replay(
        config, Folders(run.path, teacher, run.pruned, run.data), step, max_steps=max_steps, nearest=nearest,
        reporter=reporter,
    )  # fmt: skip
    file = run.path / "replay" / f"step-{step}.json"
    with explain_os_errors(file):
        file.parent.mkdir(exist_ok=True)
        write_json(file, found)
    return found, file


def distilled_from(run: RunFolder, config: Config, teacher: Path) -> Path:
    """Whose distribution the student learned: with `distill.teacher: previous` the student of the step before."""
    if config.distill.teacher == "original":
        return teacher
    if config.steps:
        steps, before = run.steps, len(config.steps)
    elif run.path.resolve().parent.name == "steps":
        steps, before = run.path.resolve().parent, int(run.path.resolve().name.split("-")[0]) - 1
    else:
        return teacher
    return next((RunFolder(path).student for path in steps.glob(f"{before}-*")), teacher)
