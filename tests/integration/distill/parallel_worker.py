"""Ranks of which some share layers or sequences: `parallel_worker.py JOBS.json`.

JOBS is {"models": {name: folder}, "runs": [...]}.
Models: what two ranks that share one find, beside the whole model; into FOLDER/found-RANK.json. A run is {"run_dir",
"student_dir", "teacher_dir", "data_dir", "phases"}; a phase is a config and the step `until` which its ranks are killed
when they begin it (null: they finish). What a rank saw in its first step is in RUN_DIR/seen-PHASE-RANK.json. Libraries
are imported once, and every rank is a fork.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kdscale.config.distill.objectives import TokenDivergenceConfig
from kdscale.config.distill.targets import Needs
from kdscale.config.load import build_config
from kdscale.distill import engine, trainer
from kdscale.distill.objectives.base import Objectives
from kdscale.distill.parallel.process_group import join_group
from kdscale.distill.parallel.tensor_parallel import load_sliced_model, tensor_group
from kdscale.distill.step import StudentModule
from kdscale.models.loading import load_model
from kdscale.runtime.progress import Reporter
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.placement.placed import ReplicatedTeacher
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets, TopKTargets
from tests.integration.forks import fork_ranks, import_engine

KILLED = 77
B, S, K = 2, 24, 6
LOADED: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


class Shapes(TorchDispatchMode):
    """Remembers the shape of every array that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                self.seen.add(tuple(value.shape))
        return result


def join(folder: Path, name: str, rank: int, world: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    store = dist.FileStore(str(folder / f"store-{name}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def compare_models(models: dict[str, str], folder: Path, rank: int) -> None:
    join(folder, "models", rank, 2)
    join_group(torch.device("cpu"))
    group, found = tensor_group(2), {}
    for name, path in models.items():
        whole = load_model(Path(path), **LOADED).train()
        part, split = load_sliced_model(Path(path), group, **LOADED)
        found[name] = compare(whole.requires_grad_(True), part.requires_grad_(True).train(), split)
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def compare(whole: Any, part: Any, split: Any) -> dict[str, Any]:
    """Loss, largest error of a gradient by its largest value, which parameters are whole, the teacher's targets."""
    generator = torch.Generator().manual_seed(3)
    vocab = split.vocab
    batch = MicroBatch(
        torch.randint(vocab, (B, S), generator=generator),
        torch.cat([torch.arange(10), torch.arange(S - 10)]).repeat(B, 1),
        torch.arange(0, B * S, 2),
        torch.randint(vocab, (B * S // 2,), generator=generator),
    )
    logits_NV = torch.randn(B * S // 2, vocab, generator=generator) * 2
    logits_NK, ids_NK = logits_NV.topk(K)
    top_k = TopKTargets(ids_NK, logits_NK, logits_NV.logsumexp(-1), 1.0, vocab)
    targets = Targets(rows=len(ids_NK), top_k=top_k)
    objectives = Objectives([TokenDivergenceConfig(top_k=K, ce_weight=0.3)])
    (alone,), _ = StudentModule(whole, objectives, vocab)(batch, targets)
    (shared,), _ = StudentModule(part, objectives, vocab, split.head)(batch, targets)
    alone.backward()
    shared.backward()
    parameters, errors = dict(whole.named_parameters()), {}
    for name, parameter in part.named_parameters():
        want, got = parameters[name].grad, parameter.grad
        if name in split.slices:
            cut = split.slices[name]
            want = want.narrow(cut.dim, cut.begin, cut.end - cut.begin)
        errors[name] = float((got - want).abs().max() / parameters[name].grad.abs().max())
    needs = Needs(top_k=K)
    expected: Any = OnlineTeacher(ReplicatedTeacher(whole), needs, vocab_size=vocab).targets(batch).top_k
    split_teacher = OnlineTeacher(ReplicatedTeacher(part, vocab), needs, vocab_size=vocab, shard=split.head)
    answer: Any = split_teacher.targets(batch).top_k
    return {
        "loss": [float(alone.detach()), float(shared.detach())],
        "errors": errors,
        "whole": [name for name in parameters if name not in split.slices],
        "held": {name: list(value.shape) for name, value in part.named_parameters()},
        "targets": float((answer.logits_NK - expected.logits_NK).abs().max()),
        "lse": float((answer.lse_N - expected.lse_N).abs().max()),
    }


def run_rank(job: dict[str, Any], number: int, rank: int) -> int:
    phase, folder = job["phases"][number], Path(job["run_dir"])
    join(folder, str(number), rank, phase["config"]["distill"]["processes"])
    real_step, real_train = trainer.Trainer._one_step, trainer.train_step
    counts: list[int] = []

    def one_step(self: Any, step: int, *args: Any) -> int:
        if step == phase["until"]:
            os._exit(KILLED)
        return real_step(self, step, *args)

    def train_step(*args: Any) -> Any:
        counts.append(sum(batch.token_count for batch in args[2]))
        if len(counts) > 1:
            return real_train(*args)
        with Shapes() as shapes:
            totals = real_train(*args)
        seen = {"labels": counts[0], "shapes": sorted(shapes.seen)}
        (folder / f"seen-{number}-{rank}.json").write_text(json.dumps(seen))
        return totals

    trainer.Trainer._one_step, trainer.train_step = one_step, train_step  # type: ignore[method-assign]
    folders = {name: Path(job[name]) for name in ("teacher_dir", "student_dir", "data_dir", "run_dir")}
    engine.run(build_config(phase["config"], "test"), reporter=Reporter(quiet=True), **folders)
    dist.barrier()
    return 0


def main() -> int:
    import_engine()
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for model in jobs["models"].values():
        load_model(Path(model), **LOADED)  # imports its modules
    codes = fork_ranks(2, lambda rank: compare_models(jobs["models"], Path(sys.argv[1]).parent, rank))
    if any(codes):
        print(f"models: exit codes {codes}", file=sys.stderr)
        return 1
    for job in jobs["runs"]:
        Path(job["run_dir"]).mkdir(parents=True, exist_ok=True)
        for number, phase in enumerate(job["phases"]):
            world, expected = phase["config"]["distill"]["processes"], 0 if phase["until"] is None else KILLED
            codes = fork_ranks(world, lambda rank, job=job, number=number: run_rank(job, number, rank), expected)
            if codes != [expected] * world:
                print(f"{job['run_dir']}, phase {number}: exit codes {codes}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
