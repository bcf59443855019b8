"""One run by changing numbers of ranks: `chain_worker.py JOB`, JOB a JSON object.

A phase is {"ranks", "until", **fields of distill}: that many ranks take the run on and are killed when they begin step
`until` (null: they finish it). With "signal": [rank, step] that rank gets SIGTERM in that step's first micro-batch; how
many of its micro-batches each rank began is then in RUN_DIR/began-RANK. The process imports everything once and
forks the ranks, which is what makes it quick.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from kdscale.config.load import build_config
from kdscale.distill import engine, step, trainer
from kdscale.distill.parallel.process_group import leave_group
from kdscale.errors import Interrupted
from kdscale.runtime.exits import exit_code_of
from kdscale.runtime.progress import Reporter
from kdscale_launch import STOPPED_EXIT_CODE
from tests.integration.forks import fork_ranks, import_engine

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
    began = signal_in_step(*phase["signal"], rank) if "signal" in phase else []
    tree = copy.deepcopy(job["config"])
    changed = {key: value for key, value in phase.items() if key not in ("ranks", "until", "signal")}
    tree["distill"].update({"processes": ranks, "micro_batch": 1, **changed})
    folders = {name: Path(job[name]) for name in ("teacher_dir", "student_dir", "data_dir", "run_dir")}
    try:
        engine.run(build_config(tree, "test"), reporter=Reporter(), **folders)
    except Interrupted as stop:
        Path(job["run_dir"], f"began-{rank}").write_text(str(began[-1]))
        return exit_code_of(stop)
    leave_group()
    return 0


def signal_in_step(signalled: int, number: int, rank: int) -> list[int]:
    """See the top; the list that is returned gets the micro-batches that were begun, by step."""
    real, began, to_device = trainer.Trainer._one_step, [], step.to_device

    def one_step(self: Any, current: int, *args: Any) -> None:
        began.append(0)
        real(self, current, *args)

    def first_of_micro_batch(*args: Any) -> Any:
        if began:
            began[-1] += 1
            if rank == signalled and len(began) == number + 1 and began[-1] == 1:
                signal.raise_signal(signal.SIGTERM)
        return to_device(*args)

    trainer.Trainer._one_step = one_step  # type: ignore[method-assign]
    step.to_device = first_of_micro_batch
    return began


def run_phase(job: dict[str, Any], phase: dict[str, Any], expected: int) -> list[int]:
    port = free_port()
    return fork_ranks(phase["ranks"], lambda rank: rank_main(job, phase, rank, port), expected)


def main() -> int:
    import_engine()
    for job in json.loads(sys.argv[1]):
        for phase in job["phases"]:
            expected = STOPPED_EXIT_CODE if "signal" in phase else 0 if phase["until"] is None else KILLED
            codes = run_phase(job, phase, expected)
            if codes != [expected] * phase["ranks"]:
                print(f"{phase}: exit codes {codes}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
