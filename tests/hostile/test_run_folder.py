"""Every file of a run folder, damaged in every way, under `status`, `report` and `run`.

The stages that compute are replaced by ones that put back what they left the first time; all that decides whether they
run, and all that reads and writes the run folder, is real.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdscale.cli import tables
from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.files import read_json, remove_tree
from kdscale.pipeline.runner import report_so_far, run_until
from kdscale.pipeline.stage import Stage, StageContext
from kdscale.pipeline.stages.registry import STAGES
from kdscale.prune.plan import Plan
from kdscale.report.facts import gather
from kdscale.runs.folder import Manifest, RunFolder, Status, fits
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from tests.hostile.nasty import VALUES, HostileCases, damages, edited, leaves

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

# What kdscale makes again without a word of the user, whatever has become of it.
OWN_STATE = ("status.json", "events.jsonl", "stages/", "logs/", "speed.json", "repair.json")
FILES = (
    "status.json", "events.jsonl", "config.yaml", ".lock", "plan.json", "repair.json", "data/manifest.json",
    "importance/notices.json", "importance/scores.json", "importance/scores.safetensors", "pruned/config.json",
    "pruned/model.safetensors", "student/config.json", "eval/eval.json", "report/report.json",
    "logs/metrics.jsonl", "logs/bad_batches.jsonl",
    "logs/self_check.json", *(f"stages/{name}.json" for name in STAGES), "stages/distill.started.json",
    "stages/prune.started.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(finished_run: Path) -> Config:
    return load_config(finished_run)


@pytest.fixture
def run(config: Config, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The run folder, whose stages put back what the finished run had."""
    run = RunFolder(Path(config.run_dir))
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, run=_puts_back(stage, run.path.parent / "pristine")))
    monkeypatch.setattr("kdscale.files.os.fsync", lambda handle: None)  # a third of a second each on a busy disk
    monkeypatch.setattr("kdscale.report.html.write_report", lambda path, out: gather(path))
    return run


def _puts_back(stage: Stage, pristine: Path) -> Callable[[StageContext], Mapping[str, Any]]:
    if stage.name == "report":
        return stage.run

    def work(context: StageContext) -> Mapping[str, Any]:
        for artifact in stage.writes:
            restore(pristine / artifact.path, context.run.at(artifact))
        return {"calls": 1}

    return work


def restore(source: Path, target: Path) -> None:
    remove_tree(target)
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def restore_all(run: RunFolder) -> None:
    restore(run.path.parent / "pristine", run.path)


def quiet() -> Reporter:
    return Reporter(quiet=True)


ACTIONS: dict[str, Callable[[Config, RunFolder], Any]] = {
    "status": lambda config, run: tables.status(run.path),
    "report": lambda config, run: report_so_far(config, quiet()),
    "run": lambda config, run: run_until(config, "report", quiet(), accept_changes=True),
    "run again": lambda config, run: run_until(config, "report", quiet()),
}


FOLDERS = ("stages", "logs", "checkpoints", "work", "steps", "data", "eval")


def damages_of(name: str, alike: Sequence[str]) -> list[tuple[str, Callable[[Path], None]]]:
    """Every damage; files or folders that are `alike` for what reads them share the damages, and each has a third."""
    every = list(damages())
    return every[alike.index(name) % 3 :: 3] if name in alike else every


@pytest.mark.parametrize("file", FILES)
def test_every_file(hostile: HostileCases, config: Config, run: RunFolder, file: str) -> None:
    if not (run.path.parent / "pristine" / file).exists():
        pytest.skip("the finished run has no such file")
    for name, damage in damages_of(file, [file for file in FILES if file.startswith(OWN_STATE)]):
        restore_all(run)
        damage(run.path / file)
        for action, call in ACTIONS.items():
            own = file.startswith(OWN_STATE) and action != "report"
            what = f"{file} {name}, {action}"
            hostile.run(what, lambda call=call: call(config, run), must="accept" if own else "")
    restore_all(run)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_file_or_a_link_in_place_of_a_folder(
    hostile: HostileCases, config: Config, run: RunFolder, folder: str
) -> None:
    for name, damage in damages_of(folder, FOLDERS):
        if name == "half":
            continue
        restore_all(run)
        damage(run.path / folder)
        for action, call in ACTIONS.items():
            hostile.run(f"{folder}/ {name}, {action}", lambda call=call: call(config, run))
    restore_all(run)


def test_plan_json_by_hand(hostile: HostileCases, config: Config, run: RunFolder) -> None:
    """What an edit of plan.json may be is checked before it is used: no later stage and no report trips over it."""
    restore_all(run)
    tree = read_json(run.plan)
    for path in leaves(tree, most=1):
        for name, value in VALUES.items():
            text = _as_json(edited(tree, path, value))
            what = f"plan.json: {'.'.join(map(str, path))} = {name}"
            if text is not None and hostile.run(what, lambda text=text: Plan.from_json(text)) is not None:
                run.plan.write_text(text)
                hostile.run(f"{what}, shown", lambda: gather(run.path), must="accept")
                hostile.run(f"{what}, printed", lambda: tables.plan(read_json(run.plan), 1_000_000), must="accept")
    restore_all(run)


def _as_json(tree: Any) -> str | None:
    try:
        return json.dumps(tree)
    except (ValueError, RecursionError):  # a number of too many digits: written by hand below
        return None


def test_any_json_as_state_of_our_own(hostile: HostileCases, tmp_path: Path) -> None:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    names = st.sampled_from(
        ["stages", "data", "state", "done", "facts", "seconds", "made_from", "outputs", "files", "kind", "step"]
    )
    trees = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4))
    run = RunFolder(tmp_path)
    (tmp_path / "config.yaml").write_text("")

    @SETTINGS
    @given(trees)
    def check(tree: Any) -> None:
        text = json.dumps(tree)
        run.status.write_text(text)
        run.logs.mkdir(exist_ok=True)
        run.metrics.write_text(text + "\n" + text)
        hostile.run(f"status.json: {text[:200]}", lambda: run.recorded(lambda notice: None), must="accept")
        hostile.run(f"status: {text[:200]}", lambda: tables.status(tmp_path), must="accept")
        hostile.run(f"metrics: {text[:200]}", lambda: list(read_metrics(run.metrics)), must="accept")
        hostile.run(f"records: {text[:200]}", lambda: (fits(Manifest)(tree), fits(Status)(tree)), must="accept")
        hostile.run(f"plan.json: {text[:200]}", lambda: Plan.from_json(text), must="refuse")

    check()
