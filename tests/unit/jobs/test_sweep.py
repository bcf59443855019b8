"""A sweep without its runs: the space, what is drawn again after a kill, who ends early, the files that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import load_config
from kdscale.config.sweep import SweepConfig, load_sweep
from kdscale.errors import ConfigError, Interrupted, RunFolderError
from kdscale.files import write_json, write_text
from kdscale.jobs.sweep import trials as trials_module
from kdscale.jobs.sweep.results import write_results
from kdscale.jobs.sweep.space import base_config, changed, check_space, grid_points, trial_config
from kdscale.jobs.sweep.trials import finished, link_base, open_study, run_sweep, trials_of
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter

LR, T = "distill.optimizer.lr", "distill.objectives.0.temperature"
SEARCH = {LR: {"low": 1e-4, "high": 1e-2, "log": True}, T: [1.0, 2.0]}


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., SweepConfig]:
    base = "name: b\nrun_dir: r\nteacher: {path: t}\nprune: {ffn: 64}\ndistill: {tokens: 9k}\n"
    (tmp_path / "base.yaml").write_text(base)

    def make(**changes: Any) -> SweepConfig:
        tree = {"base": str(tmp_path / "base.yaml"), "folder": str(tmp_path / "sweep"), "search": SEARCH, "trials": 5}
        return SweepConfig.model_validate({**tree, **changes})

    return make


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, settings: Callable[..., SweepConfig]) -> Callable[..., Any]:
    """Run a sweep whose trials are a formula; `stop_at`: the trial during which it is stopped."""

    def run(stop_at: int | None = None, workers: int = 1, **changes: Any) -> Any:
        chosen = settings(**changes)
        asked: list[str] = []

        def trial(sweep: Any, _trial: Any, config: Any, run: RunFolder) -> bool:
            asked.append(run.path.name)
            if len(asked) - 1 == stop_at:
                raise Interrupted(2)
            loss = abs(math.log10(config.distill.optimizer.lr) + 3) + config.distill.objectives[0].temperature
            figures = {"quality": {"kl_to_teacher": loss}, "size": {"parameters": 100 / loss}}
            write_json(run.eval / "eval.json", {"models": {"distilled": figures}})
            write_text(run.student / "model", "weights")
            return False

        monkeypatch.setattr(trials_module, "_run_in_process", trial)
        monkeypatch.setattr(trials_module, "run_until", lambda *_, **__: True)
        monkeypatch.setattr(trials_module, "link_base", lambda *_: None)
        study = run_sweep(chosen, base_config(chosen), workers, Reporter(quiet=True))
        return study, write_results(chosen, study)

    return run


def draws(study: Any) -> list[dict[str, Any]]:
    return [trial.params for trial in trials_of(study)]


def test_trials_are_judged_and_the_best_becomes_a_config(sweep: Callable[..., Any], tmp_path: Path) -> None:
    study, facts = sweep()
    assert finished(study) == 5 and [trial["state"] for trial in facts["trials"]] == ["complete"] * 5
    best = min(facts["trials"], key=lambda trial: trial["value"])
    config = load_config(tmp_path / "sweep/best.yaml")
    assert config.distill.optimizer.lr == best["draw"][LR] and config.distill.tokens == 9_000
    assert json.loads((tmp_path / "sweep/sweep.json").read_text()) == facts
    page = (tmp_path / "sweep/sweep.html").read_text()
    assert "best.yaml" in page and page.count("<svg") == 4
    kept = {path.name for path in (tmp_path / "sweep/trials").glob("*/student")}
    assert kept == {"student"} and len(list((tmp_path / "sweep/trials").glob("*/student"))) == 1


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_stopped_sweep_draws_what_an_unbroken_one_draws(
    sweep: Callable[..., Any], tmp_path: Path, sampler: str
) -> None:
    values = {LR: [1e-4, 1e-3, 1e-2], T: [1.0, 2.0]}
    whole, _ = sweep(sampler=sampler, search=values, folder=str(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        sweep(stop_at=3, sampler=sampler, search=values)
    broken, _ = sweep(sampler=sampler, search=values)
    assert draws(broken) == draws(whole)
    assert len(list((tmp_path / "sweep/trials").iterdir())) == 5
    more, _ = sweep(sampler=sampler, search=values, trials=5)
    assert len(more.trials) == len(broken.trials)  # nothing is left to do


def test_workers_that_run_at_once_draw_different_values(sweep: Callable[..., Any]) -> None:
    study, _ = sweep(sampler="random", workers=3, trials=3)
    assert len({draw[LR] for draw in draws(study)}) == 3


def test_a_grid_is_tried_once_and_goes_on_where_more_trials_are_asked_for(sweep: Callable[..., Any]) -> None:
    values = {LR: [1e-4], T: {"low": 1.0, "high": 2.0, "step": 0.5}}
    _, facts = sweep(sampler="grid", search=values, trials=2)
    assert len(facts["trials"]) == 2
    _, facts = sweep(sampler="grid", search=values, trials=99)
    assert {trial["state"] for trial in facts["trials"]} == {"complete"}
    assert sorted(trial["draw"][T] for trial in facts["trials"]) == [1.0, 1.5, 2.0]


def test_a_grid_that_is_too_large_to_list_is_refused(settings: Callable[..., SweepConfig]) -> None:
    chosen = settings(sampler="grid", search={"prune.ffn": {"low": 1, "high": 10**12, "step": 1}})
    with pytest.raises(ConfigError, match="at most 100,000 points"):
        check_space(chosen, base_config(chosen))


def test_a_trial_that_a_killed_sweep_left_running_is_waited_for(
    sweep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(trials_module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(RunFolder, "in_use", lambda run: asked.append(run.path.name) or len(asked) < 3)
    _, facts = sweep(trials=1)
    assert asked == ["0000"] * 3 and [trial["state"] for trial in facts["trials"]] == ["complete"]


def test_answers_of_the_base_run_are_not_shared_with_trials(tmp_path: Path) -> None:
    """A trial that asks for others appends to its journal in place."""
    base, run = RunFolder(tmp_path / "base"), RunFolder(tmp_path / "trial")
    answers, text = "responses/journal/0.jsonl", "data/store.json"
    for path in (base.config, base.path / answers, base.path / text):
        write_text(path, "{}")
    link_base(base, run, load_config(Path("configs/smollm2-135m-to-82m-responses.yaml")))
    assert (run.path / text).samefile(base.path / text)
    assert (run.path / answers).is_file() and not (run.path / answers).samefile(base.path / answers)


def test_another_sweep_does_not_take_over_the_folder(sweep: Callable[..., Any]) -> None:
    sweep(trials=1)
    with pytest.raises(RunFolderError, match="belongs to another sweep"):
        sweep(trials=1, tokens=8192)


def test_with_a_size_there_is_a_front(sweep: Callable[..., Any]) -> None:
    _, facts = sweep(size="parameters", trials=8)
    front = [(trial["size"], trial["value"]) for trial in facts["trials"] if trial["best"]]
    assert len(front) == 8  # the smaller the formula's model, the worse: nothing is dominated
    assert facts["size_title"] == "Parameters"


def test_a_trial_whose_values_make_no_config_fails_and_the_others_go_on(sweep: Callable[..., Any]) -> None:
    search = {"distill.micro_batch": [1, 2], "distill.global_batch": [1, 2]}
    _, facts = sweep(search=search, sampler="grid", trials=4)
    (failed,) = facts["failed"]
    assert failed["draw"] == {"distill.micro_batch": 2, "distill.global_batch": 1}
    assert "global_batch" in failed["message"]


def test_fields_of_lists_and_sections(settings: Callable[..., SweepConfig], tmp_path: Path) -> None:
    base = base_config(settings(tokens=4096, eval_tokens=64))
    assert (base.distill.tokens, base.eval.tokens, base.eval.efficiency) == (4096, 64, False)
    assert trial_config(base, {T: 3.0, "prune.ffn": 32}, tmp_path).prune.ffn == 32
    assert changed({"a": [{"b": 1}, 2]}, {"a.0.b": 5, "a.1": 6}) == {"a": [{"b": 5}, 6]}
    points = grid_points(settings(search={"prune.ffn": {"low": 32, "high": 64, "step": 16}}))
    assert sorted(point["prune.ffn"] for point in points) == [32, 48, 64]


def test_trials_make_no_forms_but_students_of_the_widths_that_these_ask_for(
    settings: Callable[..., SweepConfig], tmp_path: Path
) -> None:
    with (tmp_path / "base.yaml").open("a") as stream:
        stream.write("quantize: {forms: [{name: int4, group: 64}]}\n")
    base = base_config(settings())
    assert base.quantize is None and base.prune.multiple_of == 64


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"distill.optimizer.rate": [1.0]}, "unknown key"),
        ({"distill.objectives.3.temperature": [1.0]}, "entries 0 to 0"),
        ({LR: [1e-3, -1.0]}, r"optimizer\.lr"),
        ({"name.x": [1]}, "plain value"),
        ({T: [1.0], LR: ["fast"]}, r"optimizer\.lr"),
    ],
)
def test_a_space_that_is_no_config_is_refused_before_any_work(
    settings: Callable[..., SweepConfig], search: Any, message: str
) -> None:
    chosen = settings(search=search)
    with pytest.raises(ConfigError, match=message):
        check_space(chosen, base_config(chosen))


def test_values_that_go_together_are_no_mistake(settings: Callable[..., SweepConfig]) -> None:
    chosen = settings(search={"distill.micro_batch": [2, 16], "distill.global_batch": [8, 16]})
    check_space(chosen, base_config(chosen))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "mapping"),
        ("base: demo\nfolder: f\nsearch: {}", "search"),
        ("base: demo\nfolder: f\nsearch: {prune.ffn: {low: 5, high: 2}}", "must be less than high"),
        ("base: demo\nfolder: f\nsearch: {prune.ffn: {low: 0, high: 2, log: true}}", "above 0"),
        ("base: demo\nfolder: f\nsearch: {prune.ffn: [1, 1]}", "every value once"),
        ("base: demo\nfolder: f\nsearch: {prune.ffn: {low: 1, high: 2}}\nsampler: grid", "needs values or a step"),
        ("base: demo\nfolder: f\nsearch: {prune.ffn: [1]}\ntrails: 3", "did you mean 'trials'"),
    ],
)
def test_a_file_that_is_no_sweep(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_sweep(tmp_path / "sweep.yaml")


def test_a_trial_ends_early_unless_it_is_among_the_best_third(
    settings: Callable[..., SweepConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings()
    sweep = trials_module.Sweep(chosen, base_config(chosen), open_study(chosen), Reporter(quiet=True))
    ended = []
    for number, ce in enumerate([5.0, 4.0, 4.5, 4.6, 3.9]):
        run = RunFolder(tmp_path / str(number))
        write_text(run.metrics, json.dumps({"kind": "validation", "step": 5, "ce": ce}) + "\n")
        ended.append(trials_module._judge(sweep, sweep.study.ask(), run, 0))
    assert ended == [(1, False), (1, False), (1, False), (1, True), (1, False)]


@pytest.mark.parametrize("path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_sweeps_fit_their_config(path: Path) -> None:
    chosen = load_sweep(path)
    check_space(chosen, base_config(chosen))
