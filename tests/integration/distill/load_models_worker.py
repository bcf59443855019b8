"""Runs of ZeRO-3 with a partitioned teacher over 1, 2 and 4 gloo processes: load_models_worker.py ARGUMENTS.json.

Libraries are imported once and every rank is a fork. Run WORLD is in FOLDER/WORLD; what a rank found when it had loaded
the student is in FOLDER/loaded-WORLD-RANK.json, its labels a step in FOLDER/counts-WORLD-RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdscale.config.load import build_config
from kdscale.distill import engine, load_models, trainer
from kdscale.models.loading import load_model
from kdscale.runtime.progress import Reporter
from tests.integration.forks import fork_ranks


def run_rank(arguments: dict[str, Any], world: int, rank: int) -> None:
    folder = Path(arguments["folder"])
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store-{world}"), world), rank=rank,
                            world_size=world)  # fmt: skip
    load = load_models.load
    student_dir = Path(arguments["student"])

    def load_and_look(*args: Any) -> Any:
        models = load(*args)
        (folder / f"loaded-{world}-{rank}.json").write_text(json.dumps(look(models.student.model, student_dir)))
        return models

    train_step, counts = trainer.train_step, []

    def count_and_train(*args: Any) -> Any:
        counts.append(sum(batch.token_count for batch in args[2]))
        return train_step(*args)

    load_models.load, trainer.train_step = load_and_look, count_and_train
    (folder / str(world)).mkdir(exist_ok=True)
    config = build_config(arguments["configs"][str(world)], "test")
    engine.run(
        config,
        teacher_dir=Path(arguments["teacher"]),
        student_dir=student_dir,
        data_dir=Path(arguments["data"]),
        run_dir=folder / str(world),
        reporter=Reporter(quiet=True),
    )
    (folder / f"counts-{world}-{rank}.json").write_text(json.dumps(counts))
    dist.barrier()


def look(model: Any, student_dir: Path) -> dict[str, Any]:
    """The partitioned student beside the whole one, just after it was loaded."""
    from deepspeed import zero

    dtype = next(model.parameters()).dtype
    plain = load_model(student_dir, dtype=dtype, device=torch.device("cpu"))
    parameters, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    found: dict[str, Any] = {
        "whole": sum(value.numel() for value in theirs.values()),
        "held": sum(value.numel() for value in parameters.values()),
        "stored": sum(value.ds_tensor.numel() for value in parameters.values()),
        "names": list(parameters) == list(theirs),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }
    with zero.GatheredParameters(list(parameters.values())):
        found["weights"] = all(torch.equal(value, theirs[name]) for name, value in parameters.items())
    buffers, others = dict(model.named_buffers()), dict(plain.named_buffers())
    found["buffers"] = buffers.keys() == others.keys() and all(
        torch.equal(value, others[name]) and value.dtype == others[name].dtype for name, value in buffers.items()
    )
    return found


def main() -> None:
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - what an engine imports, once for all forks
    import torch.utils.tensorboard

    torch.set_num_threads(1)
    arguments = json.loads(Path(sys.argv[1]).read_text())
    load_model(Path(arguments["student"]), dtype=torch.float32, device=torch.device("cpu"))  # imports its modules
    for world in map(int, arguments["configs"]):
        codes = fork_ranks(world, lambda rank, world=world: run_rank(arguments, world, rank))
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
