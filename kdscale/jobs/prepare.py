"""What one node of a job does before its ranks meet: as a job of its own, and how long the others wait for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.families import load_family
from kdscale.jobs.launch import LaunchRequest
from kdscale.pipeline.stage import manifest_path
from kdscale.pipeline.stages.registry import STAGES, last_alone
from kdscale.runs.folder import RunFolder
from kdscale.sizing.model_shape import ModelShape
from kdscale.sizing.preparation import estimate_preparation
from kdscale.weights import read_config

_PROCESSES = "distill.processes"


def prepare_request(request: LaunchRequest, slots: int) -> LaunchRequest:
    """The same run up to the stage before the ranks meet, for one process on a node of `slots` GPUs.

    Distillations of steps and probes, which are runs of their own, are done there by as many ranks.
    """
    others = tuple(item for item in request.overrides if item.partition("=")[0] != _PROCESSES)
    overrides = (*others, f"{_PROCESSES}={slots}")
    config = load_config(request.path, overrides)
    return replace(request, overrides=overrides, config=config, until=last_alone(config).name)


def waiting_note(config: Config, nodes: int, slots: int) -> str | None:
    """How long the GPUs of the other nodes wait while the first one prepares; None when there is no waiting.

    Without a figure where the teacher's config.json is not on this machine, or nothing runs on GPUs. Raises
    CheckpointError for a teacher that cannot be used.
    """
    run = RunFolder(Path(config.run_dir))
    if nodes == 1 or manifest_path(last_alone(config), run).exists():
        return None
    waiting = (nodes - 1) * slots
    advice = "--prepare makes that a job of one node, for which this one waits"
    folder = Path(config.teacher.path)
    if config.runtime.device == "cpu" or not (folder / "config.json").is_file():
        return f"one node tokenises and prunes first, and the other {waiting} ranks wait: {advice}"
    model = read_config(folder)
    teacher = ModelShape.of(model, load_family(model, str(folder / "config.json")))
    search = config.prune.search
    probes = 0 if search.probe_tokens is None else 2 * search.probe_candidates * search.probe_tokens
    found = estimate_preparation(
        teacher, text_tokens=0 if manifest_path(STAGES["data"], run).exists() else config.distill.tokens,
        calibration_tokens=config.importance.calibration_tokens, probe_tokens=probes, gpus=slots,
    )  # fmt: skip
    first, text = (f"{math.ceil(seconds / 60)} min" for seconds in (found.seconds, found.text))
    hours = waiting * found.seconds / 3600
    return (
        f"one node tokenises and prunes first, about {first}, of which {text} for text as long as the training; "
        f"the other {waiting} ranks wait, {hours:.1f} hours in all: {advice}"
    )
