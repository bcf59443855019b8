"""Work on the device in processes of its own: several that share it, or one that takes its memory with it."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.load import dump_config, load_config
from kdscale.errors import CheckpointError, ConfigError, Interrupted
from kdscale.files import read_json, write_text
from kdscale.pipeline import rank_main, spawn
from kdscale.pipeline.checks import check_devices, check_prepared
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.spawn import PLACE_VARIABLE, ranks_of, run_on_ranks
from kdscale.pipeline.stage import StageContext, manifest_path
from kdscale.pipeline.stages.evaluate import evaluate_rank
from kdscale.pipeline.stages.registry import STAGES, stages_of
from kdscale.runs.folder import RunFolder
from kdscale.runtime.exits import exit_code_of
from kdscale.runtime.progress import Reporter
from kdscale_launch import JobSpec, RankFailed

QUIET = Reporter(quiet=True)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def context(tiny_config: Path, kdscale_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> StageContext:
    """A run with text, and two students: the teacher with its weights scaled."""
    for name, value in kdscale_environment.items():
        monkeypatch.setenv(name, value)
    more = ["runtime.threads=1", "eval.efficiency=false", "eval.prompts=[The river, And the, A mill]"]
    config = load_config(tiny_config, more)
    run, teacher = RunFolder(Path(config.run_dir)), Path(config.teacher.path)
    run_until(config, "data", QUIET)
    write_text(run.config, dump_config(config))
    for student, factor in ((run.pruned, 1.1), (run.student, 1.02)):
        shutil.copytree(teacher, student)
        scaled = {name: value * factor for name, value in load_file(teacher / "model.safetensors").items()}
        save_file(scaled, student / "model.safetensors", metadata={"format": "pt"})
    return StageContext(config, run, teacher, QUIET)


@pytest.mark.long
def test_ranks_that_share_an_evaluation_find_what_one_finds(context: StageContext) -> None:
    found = []
    for ranks in (1, 2):
        run_on_ranks("eval", evaluate_rank, context, ranks)
        found.append(read_json(context.run.eval / "eval.json") | {"seconds": None})
        shutil.rmtree(context.run.eval)
    assert found[0] == found[1]
    assert all(text for sample in found[1]["samples"] for text in sample["outputs"].values())
    weights = load_file(context.run.student / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, context.run.student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"^the distilled model gives a loss that is not finite\n(.|\n)*eval.dtype"
    ):
        run_on_ranks("eval", evaluate_rank, context, 1)
    assert not context.run.eval.exists()


def test_a_single_rank_leaves_the_parent_without_the_device(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the search runs in a process of its own, with the same result."""
    run_until(context.config, "plan", QUIET)
    expected = context.run.plan.read_bytes()
    context.run.plan.unlink()
    monkeypatch.setattr(spawn, "needs_process", lambda config: True)
    monkeypatch.setattr("kdscale.pipeline.stages.plan.search_plan", lambda *_: pytest.fail("it ran in this process"))
    run_until(context.config, "plan", QUIET)
    assert context.run.plan.read_bytes() == expected


@pytest.mark.usefixtures("two_gpus")
def test_a_host_without_enough_gpus_is_found_before_any_work(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config, ["distill.processes=4", "distill.micro_batch=1"])
    with pytest.raises(ConfigError, match=r"distill\.processes = 4"):
        run_until(config, "data", QUIET)
        run_until(config, "report", QUIET)
    with pytest.raises(ConfigError, match=r"distill\.processes = 4"):
        check_devices(config, stages_of(config))
    monkeypatch.setenv(PLACE_VARIABLE, json.dumps({}))  # in a larger job every rank looks at its own
    check_devices(config, stages_of(config))
    with pytest.raises(ConfigError, match=r"importance\.processes = 3"):
        check_devices(load_config(tiny_config, ["importance.processes=3"]), stages_of(config))
    steps = "[{name: a, prune: {ffn: 96}, distill: {processes: 4, micro_batch: 1}}]"
    monkeypatch.delenv(PLACE_VARIABLE)
    with pytest.raises(ConfigError, match=r"distill\.processes of step a = 4"):
        run_until(load_config(tiny_config, [f"steps={steps}"]), "plan", QUIET)


@pytest.mark.usefixtures("two_gpus")
def test_importance_and_evaluation_take_all_gpus_of_the_host(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    assert [ranks_of(config, stage.processes) for stage in stages_of(config) if stage.run_rank] == [2, 1, 2, 1, 2]
    one_batch = load_config(tiny_config, ["importance.calibration_tokens=64", "eval.tokens=64"])
    assert ranks_of(one_batch, "importance.processes") == ranks_of(one_batch, "eval.processes") == 1
    on_cpu = load_config(tiny_config, ["runtime.device=cpu"])
    assert ranks_of(on_cpu, "importance.processes") == ranks_of(on_cpu, "eval.processes") == 1
    assert ranks_of(load_config(tiny_config, ["eval.processes=1"]), "eval.processes") == 1
    asked = load_config(tiny_config, ["eval.downstream={processes: 3}"])
    assert ranks_of(asked, "eval.downstream.processes") == 3
    assert ranks_of(load_config(tiny_config, ["eval.downstream={}"]), "eval.downstream.processes") == 2


def test_a_job_of_many_ranks_distils_once(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other ranks wait for the run's own distillation: those of steps and probes must be done before."""
    monkeypatch.setenv(PLACE_VARIABLE, json.dumps({}))
    steps = "steps=[{name: a, prune: {ffn: 96}, distill: {}}]"
    probes = ["prune={target_params: 90%}", "prune.search.probe_tokens=512"]
    correct = ["correct={}"]
    for overrides, field in (([steps], "steps"), (probes, "prune.search.probe_tokens"), (correct, "correct")):
        config = load_config(tiny_config, overrides)
        with pytest.raises(ConfigError, match=rf"^{field}\n(.|\n)*kdscale prune"):
            run_until(config, "report", QUIET)
    trained = load_config(tiny_config, ["quantize.forms=[{name: int4, method: distilled}]"])
    with pytest.raises(ConfigError, match=r"^quantize\.forms(.|\n)*--until distill"):  # that comes after it
        check_prepared(trained, stages_of(trained))
    config = load_config(tiny_config, [steps])
    write_text(manifest_path(STAGES["distill"], RunFolder(Path(config.step(0).run_dir))), "{}")
    check_prepared(config, stages_of(config))


@pytest.mark.parametrize(("stage", "across_job", "kept"), [("importance", False, True), ("distill", True, False)])
def test_ranks_that_a_signal_kills_lose_a_distillation_s_steps_and_nothing_else(
    stage: str, across_job: bool, kept: bool, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of other stages die of SIGTERM as soon as it comes; under a job system the job must still start again."""
    monkeypatch.setattr("kdscale_launch.run_local", lambda spec: 128 + signal.SIGTERM)
    config = load_config(tiny_config)
    context = StageContext(config, RunFolder(Path(config.run_dir)), Path(config.teacher.path), QUIET)
    with pytest.raises(Interrupted) as stop:
        run_on_ranks(stage, lambda context: None, context, 2, across_job=across_job)
    assert stop.value.kept is kept
    assert exit_code_of(stop.value) == (75 if kept else 143)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_raised_is_raised_in_the_process_that_waits(
    rank: int, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny_config)
    context = StageContext(config, RunFolder(Path(config.run_dir)), Path(config.teacher.path), QUIET)
    write_text(context.run.config, dump_config(config))
    refusal = CheckpointError("a weight", expected="a number", got="none", hint="look at it")

    def refuse(_: StageContext) -> None:
        raise refusal

    def run_one_rank(spec: JobSpec) -> int:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        raise RankFailed(rank, rank_main.main(spec.command[3:]), "its log")

    monkeypatch.setitem(STAGES, "eval", replace(STAGES["eval"], run_rank=refuse))
    monkeypatch.setattr("kdscale_launch.run_local", run_one_rank)
    with pytest.raises(CheckpointError) as raised:
        run_on_ranks("eval", refuse, context, 2)
    assert str(raised.value) == str(refusal)
    assert ("error: a weight" in capfd.readouterr().err) is (rank > 0)  # rank 0 prints to the terminal
    assert not list(context.run.logs.glob("*.error.json"))
