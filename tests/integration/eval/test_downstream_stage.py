"""The stage downstream on tiny models: what it leaves, when it is done again, what survives a kill, and the report."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kdscale.cli import tables
from kdscale.config.load import dump_config, load_config
from kdscale.errors import ConfigError, Interrupted
from kdscale.eval.downstream import measure
from kdscale.files import read_json, write_text
from kdscale.packaging import card_sections
from kdscale.pipeline.stage import StageContext, inputs_of, run_stage, why_stale
from kdscale.pipeline.stages.registry import STAGES
from kdscale.report import downstream_plots
from kdscale.report.downstream_facts import downstream
from kdscale.report.html import write_report
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from tests.integration.eval.conftest import TaskMaker

QUIET = Reporter(quiet=True)
STAGE = STAGES["downstream"]


@pytest.fixture
def context(tiny_config: Path, task_maker: TaskMaker) -> StageContext:
    """A run with two students, the teacher with its weights scaled, and two tasks."""
    files = [task_maker("few", items=4), task_maker("many", items=9)]
    config = load_config(
        tiny_config, ["runtime.threads=1", f"eval.downstream={{tasks: [{files[0]}, {files[1]}], limit: 8}}"]
    )
    run, teacher = RunFolder(Path(config.run_dir)), Path(config.teacher.path)
    write_text(run.config, dump_config(config))
    for student, factor in ((run.pruned, 2.0), (run.student, 1.02)):
        shutil.copytree(teacher, student)
        scaled = {name: value * factor for name, value in load_file(teacher / "model.safetensors").items()}
        save_file(scaled, student / "model.safetensors", metadata={"format": "pt"})
    return StageContext(config, run, teacher, QUIET)


def changed(context: StageContext, *settings: str) -> StageContext:
    return replace(context, config=load_config(context.run.config, settings))


def result_of(context: StageContext) -> Any:
    return read_json(context.run.path / "downstream" / "downstream.json")


def test_all_models_get_the_same_items_and_the_report_shows_them(
    context: StageContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(STAGE, context)
    result = result_of(context)
    assert list(result["models"]) == ["teacher", "pruned", "distilled"]
    assert result["tasks"]["many"] == {
        "metric": "acc_norm", "items": 8, "available": 9, "num_fewshot": 0, "chance": 0.5,
    }  # fmt: skip
    assert list(result["differences"]) == [
        "pruned_minus_teacher", "distilled_minus_teacher", "distilled_minus_pruned",
    ]  # fmt: skip
    items = {name: read_json(context.run.path / "downstream" / "items" / f"{name}.json") for name in result["models"]}
    assert len({tuple(task["ids"]) for tasks in items.values() for task in tasks if task["task"] == "many"}) == 1
    few = {name: tasks[0]["scores"] for name, tasks in items.items()}
    gap = result["differences"]["pruned_minus_teacher"]["tasks"]["few"]
    assert gap["rose"] == sum(new > old for new, old in zip(few["pruned"], few["teacher"], strict=True))
    assert not (context.run.work / "downstream").exists()
    facts = read_json(context.run.stages / "downstream.json")["facts"]
    assert set(facts) == {"teacher accuracy", "pruned accuracy", "distilled accuracy", "items"}

    write_report(context.run.path, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Tasks with right answers" in page and "many 8 of 9" in page and "Distilled against pruned" in page
    card, results = card_sections.measured(context.run.path)
    assert "only a sample was asked: many 8 of 9" in card
    assert [one.dataset for one in results] == ["few"]
    tables.results(context.run.path, "downstream")
    assert "mean over tasks" in capsys.readouterr().out


def test_evaluation_and_tasks_do_not_repeat_each_other(context: StageContext) -> None:
    run_stage(STAGE, context)
    assert not run_stage(STAGE, changed(context, "eval.tokens=128", "eval.downstream.batch_size=2"))
    other = changed(context, "eval.downstream.limit=2")
    assert inputs_of(STAGES["eval"], other) == inputs_of(STAGES["eval"], context)
    assert inputs_of(STAGES["eval"], changed(context, "eval.downstream=null")) == inputs_of(STAGES["eval"], context)
    reasons = why_stale(STAGE, other, inputs_of(STAGE, other))
    assert reasons == ["derived.downstream.limit: 8 → 2"]
    assert context.config.eval.downstream is not None
    data = Path(context.config.eval.downstream.tasks[0]).with_suffix(".jsonl")
    data.write_text(data.read_text().replace('"label": 1', '"label": 0'))
    assert run_stage(STAGE, context)


def test_a_killed_stage_keeps_what_was_scored(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    original, kill_at = measure.score, [4]

    def score(model: Any, tokenizer: Any, tasks: Any, settings: Any, bar: Any) -> Any:
        if len(asked) == kill_at[0]:
            raise Interrupted(signal.SIGTERM)
        asked.append((model.name_or_path.split("/")[-1], tasks[0].name))
        return original(model, tokenizer, tasks, settings, bar)

    monkeypatch.setattr(measure, "score", score)
    with pytest.raises(Interrupted):
        run_stage(STAGE, context)
    assert asked[2:] == [("pruned", "few"), ("pruned", "many")]
    damaged = next((context.run.work / "downstream").glob("*.json"))
    damaged.write_text('{"scores": [1]}')
    kill_at[0] = -1
    assert run_stage(STAGE, context)
    assert len(asked) == 7  # the damaged one, and the two of the distilled student


def test_checkpoints_give_a_curve(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[int] = []

    def export_run(path: Path, step: int, out: Path, reporter: Any) -> Path:
        exported.append(step)
        shutil.copytree(context.run.pruned, out)
        return out

    monkeypatch.setattr("kdscale.distill.export.export_run", export_run)
    for step in (3, 6, 9):
        write_text(context.run.checkpoints / f"step-{step:08d}" / "manifest.json", "{}")
    with_curve = changed(context, "eval.downstream.checkpoints=true")
    run_stage(STAGE, with_curve)
    result = result_of(context)
    assert exported == [3, 6]  # the last one is the student
    assert [point["tokens"] for point in result["curve"]] == [3 * 256, 6 * 256, 9 * 256]
    means = {name: model["mean"] for name, model in result["models"].items()}
    assert [point["mean"] for point in result["curve"]] == [means["pruned"], means["pruned"], means["distilled"]]
    plot = downstream_plots.curve({"downstream": downstream(context.run.path / "downstream")})
    assert plot is not None and "training tokens" in plot.wide


def test_a_run_without_the_section_has_no_such_stage_and_bad_tasks_are_found_before_work(
    context: StageContext, tmp_path: Path
) -> None:
    config = changed(context, "eval.downstream.tasks=[/nowhere/a.yaml, /nowhere/b.yaml]").config
    assert STAGE.check_before is not None
    with pytest.raises(ConfigError) as error:
        STAGE.check_before(config, context.run)
    assert "a.yaml" in str(error.value) and "b.yaml" in str(error.value)


def test_a_quantised_student_is_asked_like_the_others(
    tiny_llama_dir: Path, tmp_path: Path, task_maker: TaskMaker
) -> None:
    import torch

    from kdscale.config.quantize import Int8Config
    from kdscale.eval.downstream.harness import score
    from kdscale.models.loading import load_model, load_tokenizer
    from tests.integration.quantize.test_formats import write

    write(tiny_llama_dir, Int8Config(), tmp_path / "int8")
    file = str(task_maker())
    loaded = [
        load_model(path, dtype=torch.float32, device=torch.device("cpu"))
        for path in (tiny_llama_dir, tmp_path / "int8")
    ]
    whole, int8 = (score(model, load_tokenizer(tiny_llama_dir), [file])["toy"].margins for model in loaded)
    assert whole is not None and int8 is not None
    gap = abs(whole - int8).max()
    assert 0 < gap < 0.2 * abs(whole).max()
