"""What a config would make, computed in a process of its own: `python -m kdscale.service.api.checking.estimate`.

Reads one JSON object from standard input and writes one to standard output. It may load torch and read what others
wrote, it has a time limit, and it starts and writes nothing.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import KdscaleError
from kdscale.jobs.cluster_plan import plan_cluster, to_json
from kdscale.pipeline.checks import find_problems
from kdscale.pipeline.stages.registry import stages_of
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from kdscale.service.problems import field_of_error
from kdscale.sizing.gpus import GpuCluster, find_gpu
from kdscale.sizing.speed import Rates
from kdscale.weights import resolve_teacher

_RATES = Rates(compute=0.40, links=0.70)  # the defaults of `kdscale plan-cluster`


def main() -> None:
    """Answer one question."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    question = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not the answer
    json.dump(estimate(question), out)
    out.close()


def estimate(question: dict[str, Any]) -> dict[str, Any]:
    """The members of a Verdict, for `config` (resolved), `here` (it would run on this machine) and `cluster`."""
    config, said = build_config(question["config"], "the config"), io.StringIO()
    reporter = Reporter(console=Console(file=said, soft_wrap=True))
    stages = stages_of(config)
    errors, teacher, plans = find_problems(
        config, RunFolder(Path(config.run_dir)), stages, reporter, devices=question["here"]
    )
    answer: dict[str, Any] = {"stages": [stage.name for stage in stages]}
    if plans and len(plans) == len(config.steps) + 1:
        sizes = dataclasses.asdict(plans[-1].student.dims())
        answer["student"] = {name: size for name, size in sizes.items() if size}
        answer["student_parameters"] = plans[-1].student_params.total
    if teacher is not None:
        try:
            answer |= _costs(config, question["cluster"])
        except KdscaleError as error:
            errors.append(error)
    answer["refused"] = [
        {
            "field": field_of_error(error),
            "detail": error.what,
            "expected": error.expected,
            "got": error.got,
            "hint": error.hint,
        }
        for error in {str(error): error for error in errors}.values()
    ]
    answer["notes"] = [line.strip().removeprefix("note: ") for line in said.getvalue().splitlines()]
    answer["notes"] += answer.pop("plan_notes", [])
    return answer


def _costs(config: Config, cluster: dict[str, Any]) -> dict[str, Any]:
    """Memory, speed and days of the best setting on the cluster that was asked about."""
    hardware = GpuCluster(
        find_gpu(cluster["gpu"]), cluster["nodes"], cluster["gpus_per_node"], cluster["host_memory_bytes"]
    )
    plan = plan_cluster(config, resolve_teacher(config.teacher, config_only=True), hardware, _RATES)
    told = to_json(plan)
    best = told["settings"][0]
    return {
        "teacher_parameters": told["teacher_params"],
        "plan_notes": told["notes"],
        "estimate": {
            "cluster": told["cluster"], "assumed": cluster["assumed"], "fits": best["fits"], "setting": best,
            "gpu_bytes": best["gpu_bytes"], "tokens": told["tokens"], "tokens_per_second": best["tokens_per_second"],
            "days": best["days"],
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
