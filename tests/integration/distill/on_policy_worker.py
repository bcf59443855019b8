"""Distillations in forks, each of which may kill itself: `on_policy_worker.py JOBS.json`.

JOBS is a list of {"config", "teacher_dir", "student_dir", "data_dir", "run_dir", "ranks", "step", "texts"}: SIGKILL
comes before step `step` is trained, or when `texts` texts are written (null: never). A process that has run an engine
cannot fork ranks any more, so this one never runs one itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kdscale.config.load import build_config
from kdscale.distill import engine
from kdscale.distill.trainer import Trainer
from kdscale.responses.journal import Journal
from kdscale.runtime.progress import Reporter
from tests.integration.forks import fork_ranks, import_engine

ONE_STEP, APPEND = Trainer._one_step, Journal.append


def run(job: dict[str, Any], rank: int) -> None:
    def one_step(self: Trainer, number: int, *args: Any) -> None:
        if number == job["step"]:
            os.kill(os.getpid(), signal.SIGKILL)
        ONE_STEP(self, number, *args)

    def append(self: Journal, key: str, **content: Any) -> None:
        if len(self) == job["texts"]:
            os.kill(os.getpid(), signal.SIGKILL)
        APPEND(self, key, **content)

    Trainer._one_step, Journal.append = one_step, append  # type: ignore[method-assign]
    folder = Path(job["run_dir"])
    if job["ranks"] > 1:
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(job["ranks"]))
        store = dist.FileStore(str(folder / "store"), job["ranks"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job["ranks"])
    engine.run(
        build_config(job["config"], "test"), teacher_dir=Path(job["teacher_dir"]),
        student_dir=Path(job["student_dir"]), data_dir=Path(job["data_dir"]), run_dir=folder,
        reporter=Reporter(quiet=True),
    )  # fmt: skip


def main() -> None:
    import_engine()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        Path(job["run_dir"]).mkdir(parents=True, exist_ok=True)
        dies = job["step"] is not None or job["texts"] is not None
        expected = -signal.SIGKILL if dies else 0
        codes = fork_ranks(job["ranks"], partial(run, job), expected)
        assert codes == [expected] * job["ranks"], (job["run_dir"], codes)


if __name__ == "__main__":
    main()
