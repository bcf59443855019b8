"""Candidates of the search by tasks: masked answers are those of the written student, and the plan follows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdscale.cli import tables
from kdscale.config.load import load_config
from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.eval.downstream.harness import ScoreSettings, prepare, score
from kdscale.eval.downstream.token_requests import TokenRequests, require_choices
from kdscale.models.loading import load_model, load_tokenizer, model_on_meta, open_teacher
from kdscale.pipeline.candidate_tasks import question_batches
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages import plan as plan_stage
from kdscale.prune.apply import apply_plan
from kdscale.prune.search.masked import score_masked
from kdscale.prune.search.planning import make_plan
from kdscale.prune.search.questions import Questions
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter
from tests.integration.eval.conftest import TaskMaker

QUIET = Reporter(quiet=True)


def test_masked_answers_are_those_of_the_written_student(
    tiny_llama_dir: Path, task_maker: TaskMaker, tmp_path: Path
) -> None:
    """The same tokens, items and scores as when the harness asks the student itself, of every candidate and teacher."""
    from types import SimpleNamespace

    teacher, family = open_teacher(tiny_llama_dir)
    tasks = prepare(["builtin:cloze", str(task_maker(items=5))], ScoreSettings(limit=6))
    tokenizer = load_tokenizer(tiny_llama_dir)
    asked = TokenRequests(model_on_meta(tiny_llama_dir, dtype=torch.float32), tokenizer, tasks)
    judged: list[Any] = []
    questions = Questions(
        question_batches(asked.texts, asked.answers, 100), len(asked.answers),
        lambda values: judged.append(asked.judge(values)) or judged[-1],
    )  # fmt: skip
    assert len(questions.batches) > 2
    plans = [
        make_plan(teacher.config, family, None, PruneConfig(**cut, compensate="none"))
        for cut in ({"ffn": 64}, {"heads": 4}, {"layers": 2})
    ]
    ids = torch.arange(20)[None] % 100
    labelled = [SimpleNamespace(input_ids_BS=ids, position_ids_BS=ids, labels_BS=ids.roll(-1))]
    found = score_masked(teacher, family, plans, labelled, questions=questions)

    models = [tiny_llama_dir, *(tmp_path / str(number) for number in range(len(plans)))]
    for plan, folder in zip(plans, models[1:], strict=True):
        folder.mkdir()
        apply_plan(teacher, family, plan, folder, PruneConfig(ffn=64, compensate="none"), batches=[], reporter=QUIET)
    for folder, ours in zip(models, judged, strict=True):
        model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
        for name, theirs in score(model, tokenizer, tasks).items():
            assert ours[name].ids == theirs.ids
            assert ours[name].margins is not None
            np.testing.assert_allclose(ours[name].margins, theirs.margins, atol=1e-4)
            assert ours[name].scores.tolist() == theirs.scores.tolist()
    answers = [item.task for item in found]
    assert all(answer is not None and answer.items == 11 for answer in answers)
    assert min(answer.behind for answer in answers if answer) == 0.0


def test_the_plan_follows_the_tasks_and_their_files(
    tiny_config: Path, task_maker: TaskMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    file = task_maker(items=8)
    settings = [
        "prune.ffn=null", "prune.heads=null", "prune.tolerance=0.1", "prune.target_params=70%", "runtime.threads=1",
        "prune.axes=[ffn,heads,layers]", "prune.search.masked_candidates=3", "prune.search.masked_tokens=64",
        "prune.search.score=task", f"prune.search.tasks=[{file}]", "prune.search.task_items=5",
    ]  # fmt: skip
    config = load_config(tiny_config, settings)
    run_until(config, "plan", QUIET)
    run = RunFolder(Path(config.run_dir))
    plan = json.loads(run.plan.read_text())
    answers = [row["masked"]["task"] for row in plan["candidates"][:3]]
    assert all(row["masked"] is None for row in plan["candidates"][3:])
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert answers[0]["behind"] == answers[0]["behind_error"] == 0.0
    assert answers[1]["behind"] == pytest.approx(scores[0] - scores[1])
    assert all(answer["items"] == 5 and answer["behind_error"] > 0 for answer in answers[1:])

    tables.plan(plan, 1000)
    out = capfd.readouterr().out
    for words in ("score on 5 items", "behind", f"{scores[0]:.3f} ± {answers[0]['score_error']:.3f}"):
        assert words in out

    context = StageContext(config, run, Path(config.teacher.path), QUIET)
    before = plan_stage.what_matters(context)
    file.with_suffix(".jsonl").write_text(file.with_suffix(".jsonl").read_text() + "\n")
    assert plan_stage.what_matters(context) != before


def test_tasks_that_candidates_cannot_be_asked_are_refused_before_any_work(
    tiny_config: Path, task_maker: TaskMaker
) -> None:
    file = task_maker()
    text = file.read_text().replace("multiple_choice", "generate_until").replace("doc_to_choice", "description")
    file.write_text(
        text.replace('"{{choices}}"', '""').replace("{metric: acc}, {metric: acc_norm}", "{metric: exact_match}")
    )
    with pytest.raises(ConfigError, match="answers to choose from"):
        require_choices(prepare([str(file)], ScoreSettings()), "prune.search.tasks")
    search = ["prune.ffn=null", "prune.heads=null", "prune.target_params=70%", "prune.search.score=task"]
    config = load_config(tiny_config, [*search, f"prune.search.tasks=[{file},builtin:clozes]"])
    with pytest.raises(ConfigError, match=r"builtin:clozes") as error:
        run_until(config, "plan", QUIET)
    assert "cloze" in str(error.value)
    assert not (Path(config.run_dir) / "data").exists()
