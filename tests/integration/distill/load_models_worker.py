"""Runs of ZeRO-3 over 1, 2 and 4 gloo processes: load_models_worker.py ARGUMENTS.json.

Libraries are imported once and every rank is a fork. Run NAME is in FOLDER/NAME; what a rank found when it had loaded
the student is in FOLDER/loaded-NAME-RANK.json, its labels a step in FOLDER/counts-NAME-RANK.json, the collectives that
it called in FOLDER/collectives-NAME-RANK.json.
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
from kdscale.distill.telemetry import observer
from kdscale.distill.telemetry.collectives import CollectiveTimer
from kdscale.models.loading import load_model
from kdscale.runtime.progress import Reporter
from tests.integration.forks import fork_ranks, import_engine


class Recorder(CollectiveTimer):
    """Writes down each collective that this rank starts: which one, in which group, with how many values."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls: list[list[Any]] = []
        self._groups: dict[Any, int] = {}

    def timed(self, function: Any) -> Any:
        measured, name = super().timed(function), function.__name__
        if name == "wait":
            return measured

        def call(*args: Any, **kwargs: Any) -> Any:
            if not getattr(self._inside, "yes", False):
                self.calls.append(self._describe(name, [*args, *kwargs.values()]))
            return measured(*args, **kwargs)

        return call

    def _describe(self, name: str, values: list[Any]) -> list[Any]:
        group = next((value for value in values if isinstance(value, dist.ProcessGroup)), dist.group.WORLD)
        number = self._groups.setdefault(group, len(self._groups))  # by first use: a rank's own name for it
        lists = [value if isinstance(value, list | tuple) else [value] for value in values]
        sizes = [[str(t.dtype), t.numel()] for each in lists for t in each if isinstance(t, torch.Tensor)]
        # rows of the embedding: each rank asks for its own number of them
        return [name, number, dist.get_process_group_ranks(group), [] if name == "all_to_all_single" else sizes]


def run_rank(arguments: dict[str, Any], name: str, rank: int) -> None:
    folder, config = Path(arguments["folder"]), build_config(arguments["configs"][name], "test")
    world = config.distill.processes
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store-{name}"), world), rank=rank,
                            world_size=world)  # fmt: skip
    load = load_models.load
    student_dir = Path(arguments["student"])

    def load_and_look(*args: Any) -> Any:
        models = load(*args)
        (folder / f"loaded-{name}-{rank}.json").write_text(json.dumps(look(models.student.model, student_dir)))
        return models

    train_step, counts = trainer.train_step, []

    def count_and_train(*args: Any) -> Any:
        counts.append(sum(batch.token_count for batch in args[2]))
        return train_step(*args)

    load_models.load, trainer.train_step = load_and_look, count_and_train
    (folder / name).mkdir(exist_ok=True)
    recorder = Recorder()
    observer.CollectiveTimer = lambda device: recorder  # type: ignore[assignment, misc]
    engine.run(
        config,
        teacher_dir=Path(arguments["teacher"]),
        student_dir=student_dir,
        data_dir=Path(arguments["data"]),
        run_dir=folder / name,
        reporter=Reporter(quiet=True),
    )
    (folder / f"collectives-{name}-{rank}.json").write_text(json.dumps(recorder.calls))
    (folder / f"counts-{name}-{rank}.json").write_text(json.dumps(counts))
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
    import_engine()
    torch.set_num_threads(1)
    arguments = json.loads(Path(sys.argv[1]).read_text())
    for name, config in arguments["configs"].items():
        codes = fork_ranks(config["distill"]["processes"], lambda rank, name=name: run_rank(arguments, name, rank))
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
