"""The disk check: it counts what unfinished stages have yet to write, and nothing else."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.errors import RunFolderError
from kdscale.files import write_text
from kdscale.pipeline.checks import check_disk
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.registry import STAGES, stages_of
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter

Usage = namedtuple("Usage", "total used free")
PARAMS = 10_000_000
MARGIN = 64 << 20
PRUNED, DISTILLED = 4 * PARAMS, (4 + 3 * 12) * PARAMS  # three checkpoints: two that are kept, one being written


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    tree: dict[str, Any] = {
        "name": "t",
        "run_dir": str(tmp_path / "run"),
        "teacher": {"path": "t"},
        "prune": {"ffn": 64},
    }
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return StageContext(build_config(tree, "here"), run, tmp_path, Reporter(quiet=True))


def fits(context: StageContext, free: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr("kdscale.pipeline.checks.shutil.disk_usage", lambda path: Usage(0, 0, free))
    try:
        check_disk(context, stages_of(context.config), PARAMS)
    except RunFolderError as error:
        assert "without room" in str(error) and "distill" in str(error)
        return False
    return True


def test_both_students_and_the_checkpoints_must_fit(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = PRUNED + DISTILLED + MARGIN
    assert fits(context, needed, monkeypatch)
    assert not fits(context, needed - 1, monkeypatch)


def test_tokenised_text_is_no_part_of_what_is_still_to_be_written(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.run.data.mkdir()
    with (context.run.data / "train.bin").open("wb") as stream:
        stream.truncate(10 * DISTILLED)  # a sparse file: takes no room, and has the size of a large corpus
    assert not fits(context, PRUNED + DISTILLED + MARGIN - 1, monkeypatch)


def test_what_a_killed_try_has_written_counts(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(context.run.stages / "prune.json", "{}")  # finished: needs nothing more
    assert fits(context, DISTILLED + MARGIN, monkeypatch)
    write_text(context.run.checkpoints / "step-1" / "rank-0", "x" * 1000)
    assert fits(context, DISTILLED + MARGIN - 1000, monkeypatch)
    assert not fits(context, DISTILLED + MARGIN - 1001, monkeypatch)


def test_a_finished_run_needs_no_room(context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prune", "distill"):
        write_text(context.run.stages / f"{name}.json", "{}")
    assert fits(context, 0, monkeypatch)


@pytest.mark.parametrize("same_disk", [True, False])
def test_what_is_written_elsewhere_must_fit_there(
    context: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_disk: bool
) -> None:
    """A store that several runs share, in a folder that is not there yet, with a free disk for the rest."""
    shared = tmp_path / "shared"
    shared.mkdir()
    store = replace(STAGES["targets"], disk_bytes=lambda *_: 1000, disk_folder=lambda _: shared / "stores" / "new")
    free = {shared: 1000 + MARGIN, context.run.path: PRUNED + DISTILLED + MARGIN + (1000 if same_disk else 0)}
    if not same_disk:
        monkeypatch.setattr("kdscale.pipeline.checks._disk_of", lambda path: int(path == shared))
    monkeypatch.setattr("kdscale.pipeline.checks.shutil.disk_usage", lambda path: Usage(0, 0, free[path]))
    check_disk(context, [*stages_of(context.config), store], PARAMS)
    free[context.run.path if same_disk else shared] -= 1
    with pytest.raises(RunFolderError, match=r"targets 0\.0 GB"):
        check_disk(context, [*stages_of(context.config), store], PARAMS)
