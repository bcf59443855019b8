"""Stages: done once, done again when something they were made from changed, and saying what."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import KdscaleError, LackOfMemoryError, RunFolderError
from kdscale.files import write_text
from kdscale.pipeline.stage import (
    Stage,
    StageContext,
    changed_inputs,
    explain_lack_of_memory,
    inputs_of,
    refuse_to_lose_progress,
    run_stage,
)
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runs.digests import digest_file
from kdscale.runs.folder import Artifact, RunFolder
from kdscale.runtime.progress import Reporter


def config(**fields: Any) -> Config:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 64}, **fields}
    return build_config(tree, "here")


class Bench:
    """A run folder, two chained stages that count their calls, and what was said."""

    def __init__(self, folder: Path):
        self.console = Console(record=True, width=200, file=(folder / "log").open("w"))
        (folder / "teacher").mkdir()
        (folder / "teacher" / "config.json").write_text("{}")
        self.run = RunFolder(folder / "run")
        self.run.path.mkdir()
        self.calls: list[str] = []
        self.first = Stage(
            name="first", title="the first", run=self._work("first", "a.json"), copies=self._folders,
            config=("seed",), model="teacher", writes=(Artifact("a.json"),),
        )  # fmt: skip
        self.second = Stage(
            name="second", title="the second", run=self._work("second", "b/x"),
            config=("distill",), reads=(Artifact("a.json"),), writes=(Artifact("b"),),
            resumes_from=(Artifact("scratch"), Artifact("curve")),
        )  # fmt: skip

    def _work(self, name: str, output: str) -> Any:
        def work(context: StageContext) -> Mapping[str, Any]:
            self.calls.append(name)
            write_text(context.run.path / output, f"{name} {context.config.seed}")
            return {"calls": len(self.calls)}

        return work

    def _folders(self, context: StageContext) -> tuple[Path, Path]:
        return context.teacher, self.run.path / "copies"

    def context(self, settings: Config | None = None, accept_changes: bool = False) -> StageContext:
        reporter = Reporter(console=self.console)
        return StageContext(
            settings or config(), self.run, self.run.path.parent / "teacher", reporter, accept_changes=accept_changes
        )

    def go(self, settings: Config | None = None, accept_changes: bool = False) -> list[str]:
        self.calls.clear()
        context = self.context(settings, accept_changes)
        for stage in (self.first, self.second):
            run_stage(stage, context)
        return list(self.calls)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_finished_stages_are_not_repeated(bench: Bench) -> None:
    assert bench.go() == ["first", "second"]
    assert bench.go() == []
    assert "the first: done before" in bench.console.export_text()


def test_a_changed_setting_repeats_the_stages_it_touches(bench: Bench) -> None:
    bench.go()
    assert bench.go(config(distill={"tokens": 5000})) == ["second"]
    assert "config.distill.tokens: 1000000 → 5000" in bench.console.export_text()
    assert bench.go(config(seed=2, distill={"tokens": 5000})) == ["first", "second"]


def test_what_is_derived_from_the_settings_counts_like_a_setting(bench: Bench) -> None:
    bench.first = Stage(**{**vars(bench.first), "config": (), "depends_on": lambda c: {"even": c.config.seed % 2 == 0}})
    bench.go()
    assert bench.go(config(seed=2)) == []
    assert bench.go(config(seed=3)) == ["first", "second"]


def test_a_changed_teacher_repeats_what_reads_it(bench: Bench) -> None:
    bench.go()
    (bench.run.path.parent / "teacher" / "config.json").write_text('{"other": 1}')
    assert bench.go() == ["first"]  # the second stage's only input came out the same


def test_what_no_stage_reads_of_the_teacher_changes_nothing_but_its_copies(bench: Bench) -> None:
    teacher, copies = bench.run.path.parent / "teacher", bench.run.path / "copies"
    (teacher / "LICENSE").write_text("old")
    copies.mkdir()
    bench.go()
    for name in ("LICENSE", ".DS_Store", "chat_template.jinja", "README.md"):
        (teacher / name).write_text("new")
    assert bench.go() == []
    assert sorted(item.name for item in copies.iterdir()) == ["LICENSE", "chat_template.jinja"]
    assert (copies / "LICENSE").read_text() == "new"
    assert "copied again" in bench.console.export_text()


@pytest.mark.parametrize("name", ["README.md", "int8/README.md"])  # of a model, and of one of several
def test_a_card_that_was_edited_or_removed_is_no_reason_to_compute(bench: Bench, name: str) -> None:
    card, weights = bench.run.path / "b" / name, bench.run.path / "b" / "x"
    card.parent.mkdir(parents=True)
    bench.second = replace(bench.second, run=lambda context: (bench._work("second", "b/x")(context), card.touch())[0])
    assert bench.go() == ["first", "second"]
    card.write_text("ours")
    assert bench.go() == []
    card.unlink()
    assert bench.go() == []
    weights.unlink()
    assert bench.go() == ["second"]


def test_checkpoints_are_refused_before_the_stages_that_come_before_them_run(bench: Bench) -> None:
    bench.go()
    write_text(bench.run.path / "scratch" / "step", "1")
    (bench.run.path.parent / "teacher" / "config.json").write_text('{"other": 1}')
    with pytest.raises(RunFolderError, match=r"teacher/config\.json was changed"):
        refuse_to_lose_progress((bench.first, bench.second), bench.context())


def test_damaged_manifests_are_set_aside_and_the_stage_is_done_again(bench: Bench) -> None:
    for damage in ("[]", "{", "null", '{"made_from": 1}', "[" * 5000, ""):
        bench.go()
        (bench.run.stages / "first.json").write_text(damage)
        assert bench.go() == ["first"], damage
    bench.go()
    (bench.run.stages / "first.json").unlink()
    (bench.run.stages / "first.json").mkdir()
    assert bench.go() == ["first"]
    assert (bench.run.stages / "first.json.damaged").is_dir()


@pytest.mark.parametrize("damage", ["[]", "{", '{"stages": []}', '{"stages": {"first": {"state": "odd"}}}', "9" * 5000])
def test_a_damaged_status_is_made_again(bench: Bench, damage: str) -> None:
    bench.go()
    bench.run.status.write_text(damage)
    said: list[str] = []
    assert bench.run.recorded(said.append) == {}
    assert "damaged" in said[0] and bench.run.status.read_text() == damage
    bench.go(config(seed=7))
    assert bench.run.recorded(said.append)["first"]["state"] == "done"


def test_events_that_cannot_be_appended_to_are_set_aside(bench: Bench) -> None:
    os.mkfifo(bench.run.events)
    bench.go()
    assert bench.run.events.is_file()


def test_a_moved_run_folder_goes_on(bench: Bench) -> None:
    settings = config(run_dir=str(bench.run.path))
    bench.run.adopt_config(settings, accept_changes=False)
    bench.go(settings)
    moved = bench.run.path.rename(bench.run.path.parent / "moved")
    bench.run = RunFolder(moved)
    bench.run.adopt_config(config(run_dir=str(moved)), accept_changes=False)
    assert bench.go(config(run_dir=str(moved))) == []


def test_a_damaged_or_missing_output_is_made_again(bench: Bench) -> None:
    bench.go()
    (bench.run.path / "b" / "x").write_text("cut")
    assert bench.go() == ["second"]
    (bench.run.path / "a.json").unlink()
    assert bench.go() == ["first"]


def test_an_output_edited_by_hand_is_kept_and_noticed_downstream(bench: Bench) -> None:
    first = Stage(**{**vars(bench.first), "hand_editable": True})
    bench.first = first
    bench.go()
    (bench.run.path / "a.json").write_text("edited")
    assert bench.go() == ["second"]
    assert "the second is done again: a.json was changed" in bench.console.export_text()
    assert (bench.run.path / "a.json").read_text() == "edited"


def test_changed_files_are_named_and_a_plan_that_users_may_edit_was_edited() -> None:
    """Rather than shown by two digests that nobody can read."""
    before = {"files": {"plan.json": {"plan.json": "1"}, "teacher": {"config.json": "1", "old": "1"}}}
    answers = {"responses/answers.jsonl": {"answers.jsonl": "1"}}
    now = {"files": {"plan.json": {"plan.json": "2"}, "teacher": {"config.json": "2", "new": "1"}, **answers}}
    lines = ["plan.json was edited", "responses/answers.jsonl is new"]
    lines += ["teacher/config.json was changed", "teacher/new is new", "teacher/old is gone"]
    assert changed_inputs(before, now) == lines


def test_scratch_survives_a_kill_but_not_a_change_of_inputs(bench: Bench) -> None:
    def dies(context: StageContext) -> Mapping[str, Any]:
        write_text(context.run.path / "scratch" / "step", "1")
        write_text(context.run.path / "curve", "1")
        raise KeyboardInterrupt

    whole = bench.second
    bench.second = Stage(**{**vars(whole), "run": dies})
    with pytest.raises(KeyboardInterrupt):
        bench.go()
    bench.second = whole
    bench.go()
    assert (bench.run.path / "scratch" / "step").exists()
    with pytest.raises(RunFolderError, match=r"tokens: 1000000 → 5000\n.*--accept-changes"):
        bench.go(config(distill={"tokens": 5000}))
    assert (bench.run.path / "scratch" / "step").exists()
    bench.go(config(distill={"tokens": 5000}), accept_changes=True)
    assert not (bench.run.path / "scratch").exists()
    assert not (bench.run.path / "curve").exists()


def test_other_inputs_cost_a_stage_its_work_but_not_the_runs_in_it(bench: Bench) -> None:
    work = bench.run.work / "first"
    killed = replace(bench.first, resumable=True, run=lambda _context: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stage(killed, bench.context())
    write_text(work / "finished" / "int8", "weights")
    write_text(work / "training" / "config.yaml", "name: inner")
    write_text(work / "training" / "checkpoints" / "step-1", "weights")
    with pytest.raises(ZeroDivisionError):
        run_stage(killed, bench.context(config(seed=1)))
    assert not (work / "finished").exists()
    assert (work / "training" / "checkpoints" / "step-1").exists()
    run_stage(replace(killed, run=lambda _context: {}, writes=()), bench.context(config(seed=1)))
    assert not bench.run.work.exists()


def changes(run: RunFolder, settings: Config, accept: bool = False) -> list[str]:
    return [str(difference) for difference in run.adopt_config(settings, accept_changes=accept)]


def test_the_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.lock():
        assert run.adopt_config(config(), accept_changes=False) == []
        assert changes(run, config(seed=2)) == ["seed: 0 → 2"]  # nothing has begun yet
        assert changes(run, config()) == ["seed: 2 → 0"]
        run.stages.mkdir()
        with pytest.raises(RunFolderError, match="seed: 0 → 1") as caught:
            run.adopt_config(config(seed=1), accept_changes=False)
        assert "--accept-changes" in str(caught.value)
        assert changes(run, config(seed=1), accept=True) == ["seed: 0 → 1"]
        assert run.adopt_config(config(seed=1), accept_changes=False) == []
        # with how many ranks, and the like, a run is computed may change without a word of consent
        other = config(seed=1, distill={"processes": 2, "zero_stage": 3})
        assert changes(run, other) == ["distill.processes: 1 → 2", "distill.zero_stage: 1 → 3"]
        with pytest.raises(RunFolderError, match="seq_len: 512 → 64") as caught:
            run.adopt_config(config(seed=1, distill={"seq_len": 64}), accept_changes=False)
        assert "processes" not in str(caught.value)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("do not touch")
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(RunFolderError, match="not a run's"):
        run.adopt_config(config(), accept_changes=False)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with run.lock():
        assert other.in_use()
        with pytest.raises(RunFolderError, match="in use by process"), other.lock():
            pass
    assert not other.in_use()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="a folder"), RunFolder(tmp_path / "run").lock():
        pass


def test_digest_notices_changes_in_large_files(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(5 << 20))
    before = digest_file(path)
    with path.open("r+b") as stream:
        stream.seek(5 << 20)
        stream.write(b"x")
    assert digest_file(path) != before


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "Tried to allocate 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "DefaultCPUAllocator"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("as_rank", [False, True])
def test_a_stage_without_memory_says_what_needs_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, shown: str, as_rank: bool
) -> None:
    from kdscale.pipeline import rank_main, runner

    def work(_context: StageContext) -> Mapping[str, Any]:
        raise error

    bench = Bench(tmp_path)
    stage = replace(bench.first, run=work, run_rank=work, memory=("distill.micro_batch",))
    found: list[KdscaleError] = []
    if as_rank:
        monkeypatch.setattr(rank_main, "STAGES", {"first": stage})
        monkeypatch.setenv("RANK", "0")
        assert rank_main.run_as_rank("first", bench.context(), found.append) == LackOfMemoryError.exit_code == 15
    else:
        with pytest.raises(LackOfMemoryError) as caught:
            runner._guarded(stage, bench.context())
        found.append(caught.value)
    for part in ("first (the first)", shown, "distill.micro_batch"):
        assert part in str(found[0])


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), explain_lack_of_memory(Bench(tmp_path).first):
        raise RuntimeError("a bug")


def test_text_is_tokenised_anew_for_settings_that_older_versions_did_not_have_and_only_then(bench: Bench) -> None:
    def made_from(**data: Any) -> dict[str, Any]:
        context = StageContext(config(data=data), bench.run, bench.run.path.parent / "teacher", Reporter(quiet=True))
        return inputs_of(STAGES["data"], context)

    plain, source = made_from(), {"path": "builtin:classics"}
    assert "derived" not in plain and "class_field" not in plain["config"]["data.sources"][0]
    for data, named in (
        ({"sentences": True}, "derived"),
        ({"sources": [{**source, "class_field": "kind"}]}, "sources"),
    ):
        (line,) = changed_inputs(plain, made_from(**data))
        assert named in line
