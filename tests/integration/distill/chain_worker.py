"""One run by changing numbers of ranks: `chain_worker.py JOB`, JOB a JSON object.

A phase is {"ranks", "until", **fields of distill}: that many ranks take the run on and are killed when they begin step
`until` (null: they finish it). The process imports everything once and forks the ranks, which is what makes it quick.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - imported once, before the forks
import transformers  # noqa: F401

from kdscale.config.load import build_config
from kdscale.distill import engine, trainer
from kdscale.distill.parallel.process_group import leave_group
from kdscale.runtime.progress import Reporter
from tests.integration.forks import fork_ranks

KILLED = 77


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_main(job: dict[str, Any], phase: dict[str, Any], rank: int, port: int) -> int:
    ranks, until = phase["ranks"], phase["until"]
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    real = trainer.Trainer._one_step

    def one_step(self: Any, number: int, *args: Any) -> int:
        if number == until:
            os._exit(KILLED)
        return real(self, number, *args)

    trainer.Trainer._one_step = one_step  # type: ignore[method-assign]
    tree = copy.deepcopy(job["config"])
    changed = {key: value for key, value in phase.items() if key not in ("ranks", "until")}
    tree["distill"].update(processes=ranks, micro_batch=1, **changed)
    folders = {name: Path(job[name]) for name in ("teacher_dir", "student_dir", "data_dir", "run_dir")}
    engine.run(build_config(tree, "test"), reporter=Reporter(), **folders)
    leave_group()
    return 0


def run_phase(job: dict[str, Any], phase: dict[str, Any], expected: int) -> list[int]:
    port = free_port()
    return fork_ranks(phase["ranks"], lambda rank: rank_main(job, phase, rank, port), expected)


def main() -> int:
    for job in json.loads(sys.argv[1]):
        for phase in job["phases"]:
            expected = 0 if phase["until"] is None else KILLED
            codes = run_phase(job, phase, expected)
            if codes != [expected] * phase["ranks"]:
                print(f"{phase}: exit codes {codes}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
