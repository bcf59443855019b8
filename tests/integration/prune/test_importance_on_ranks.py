"""Calibration samples split over ranks: the scores and the student of one process, also after a rank was lost."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from kdscale.config.load import dump_config, load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.files import write_text
from kdscale.pipeline import rank_main
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.spawn import run_on_ranks
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.registry import STAGES
from kdscale.prune.importance.collect import collect_scores
from kdscale.runs.folder import RunFolder
from kdscale.runs.importance_scores import DIRECTIONS, ROTATION
from kdscale.runtime.progress import Reporter
from kdscale_launch import JobSpec, RankFailed, run_local

WORKER = Path(__file__).with_name("rank_worker.py")


def _worker():
    spec = util.spec_from_file_location("rank_worker", WORKER)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_a_lost_rank_is_resumed_and_the_scores_are_those_of_one_process(teacher, tmp_path, kdscale_environment):
    worker, folder = _worker(), teacher.checkpoint.path
    expected = collect_scores(worker.stream(folder), worker.batches(), worker.AXES, worker.CONFIG)

    def ranks(last: int) -> None:
        command = (sys.executable, str(WORKER), str(folder), str(tmp_path / "s"), str(tmp_path / "out"), str(last))
        run_local(JobSpec(command, 2, tmp_path / "logs", env=kdscale_environment, grace_seconds=1.0))

    with pytest.raises(RankFailed):
        ranks(2)
    assert not (tmp_path / "out.txt").exists()
    ranks(-1)
    assert (tmp_path / "out.txt").read_text() == "2 3"
    one, two = (load_file(tmp_path / f"out.{rank}.safetensors") for rank in range(2))
    assert one.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(one[name], two[name]), name
        # eigenvectors turn by the sums' rounding over the gap to the next eigenvalue
        tolerance = 1e-4 if name in (ROTATION, DIRECTIONS) else 1e-6
        assert np.abs(one[name] - values).max() < tolerance * np.abs(values).max(), name


def _config(tiny_config: Path, run: Path, *more: str) -> Config:
    return load_config(tiny_config, [f"run_dir={run}", "prune.layers=3", *more])


def test_two_processes_make_the_student_of_one(tiny_config, tmp_path, kdscale_environment, monkeypatch):
    for name, value in kdscale_environment.items():
        monkeypatch.setenv(name, value)
    silent = Reporter(quiet=True)
    run_until(_config(tiny_config, tmp_path / "one"), "prune", silent)
    run_until(_config(tiny_config, tmp_path / "two", "importance.processes=2"), "prune", silent)
    assert (tmp_path / "one" / "plan.json").read_bytes() == (tmp_path / "two" / "plan.json").read_bytes()
    one, two = (load_tensors(tmp_path / name / "pruned" / "model.safetensors") for name in ("one", "two"))
    rewritten = [name for name in one if not torch.equal(one[name], two[name])]
    assert all(name.endswith("_proj.weight") for name in rewritten)
    for name in rewritten:
        assert (one[name] - two[name]).abs().max() < 1e-4 * one[name].abs().max(), name
    assert not (tmp_path / "two" / "work").exists()
    assert (tmp_path / "two" / "logs" / "rank-1.log").exists()


def test_more_ranks_than_batches(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match=r"processes \(5\) must be at most the calibration batches \(4\)"):
        _config(tiny_config, tmp_path / "run", "importance.processes=5")


def test_ranks_prune_the_model_of_the_step_before(tiny_config, tmp_path, monkeypatch):
    """With steps the model that is pruned is not the teacher: every rank is told both."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    config = _config(tiny_config, run.path, "importance.processes=2")
    write_text(run.config, dump_config(config))
    before = tmp_path / "step-1" / "student"
    context = StageContext(config, run, Path(config.teacher.path), Reporter(quiet=True), before)
    jobs: list[JobSpec] = []
    monkeypatch.setattr("kdscale_launch.run_local", lambda spec: jobs.append(spec) or 0)
    run_on_ranks("importance", print, context, 2)
    seen: list[StageContext] = []
    monkeypatch.setitem(STAGES, "importance", replace(STAGES["importance"], run_rank=seen.append))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_main.main(jobs[0].command[3:]) == 0
    assert seen[0].ranks == 2
    assert (seen[0].model_to_prune, seen[0].teacher, seen[0].config) == (before, context.teacher, config)
