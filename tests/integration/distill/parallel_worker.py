"""Runs over several ranks, of which some share layers: `parallel_worker.py JOBS.json`.

A job is {"run_dir", "student_dir", "teacher_dir", "data_dir", "phases"}; a phase is a config of `ranks` processes and
the step `until` which they are killed when they begin it (null: they finish). Libraries are imported once and every
rank is a fork. What rank R saw is in RUN_DIR/seen-PHASE-R.json.
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

from kdscale.config import build_config
from kdscale.distill import engine, loop
from kdscale.models import load_model
from kdscale.progress import Reporter
from tests.integration.forks import fork_ranks

KILLED = 77


class Largest(TorchDispatchMode):
    """Remembers the widest last dimension and the most values of any tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                self.shapes.add(tuple(value.shape))
        return result


def run_rank(job: dict[str, Any], number: int, rank: int) -> int:
    phase, folder = job["phases"][number], Path(job["run_dir"])
    world = phase["config"]["distill"]["processes"]
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    store = dist.FileStore(str(folder / f"store-{number}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    real_step, real_train = loop.Trainer._one_step, loop.train_step
    seen: dict[str, Any] = {"tokens": [], "shapes": []}

    def one_step(self: Any, step: int, *args: Any) -> int:
        if step == phase["until"]:
            os._exit(KILLED)
        return real_step(self, step, *args)

    def train_step(*args: Any) -> Any:
        seen["tokens"].append(sum(batch.token_count for batch in args[2]))
        if len(seen["tokens"]) > 1:
            return real_train(*args)
        with Largest() as largest:
            totals = real_train(*args)
        seen["shapes"] = sorted(largest.shapes)
        return totals

    loop.Trainer._one_step, loop.train_step = one_step, train_step  # type: ignore[method-assign]
    folders = {name: Path(job[name]) for name in ("teacher_dir", "student_dir", "data_dir", "run_dir")}
    engine.run(build_config(phase["config"], "test"), reporter=Reporter(quiet=rank > 0), **folders)
    (folder / f"seen-{number}-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    return 0


def main() -> int:
    import deepspeed.module_inject.layers  # imported once, for all forks
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch.utils.tensorboard

    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    load_model(Path(jobs[0]["student_dir"]), dtype=torch.float32, device=torch.device("cpu"))  # imports its modules
    for job in jobs:
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
