"""The config that a command is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdscale.cli.arguments import load, run_folder
from kdscale.config.load import build_config, dump_config
from kdscale.errors import ConfigError
from kdscale.files import write_text

TREE = {"name": "t", "run_dir": "/old/place", "teacher": {"path": "t"}, "prune": {"ffn": 64}}


def test_the_config_of_a_moved_run_folder_is_of_the_run_where_it_is(tmp_path: Path) -> None:
    moved = tmp_path / "a: moved [run]"
    write_text(moved / "config.yaml", dump_config(build_config(TREE, "here")))
    assert load(str(moved / "config.yaml"), None).run_dir == "/old/place"  # a config that only has that name
    write_text(moved / "events.jsonl", "")
    assert load(str(moved / "config.yaml"), None).run_dir == str(moved)
    assert load(str(moved / "config.yaml"), ["run_dir=/new"]).run_dir == "/new"
    assert load(str(moved), None).run_dir == str(moved)  # the folder stands for its config


def test_a_folder_without_a_run_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder without a run"):
        load(str(tmp_path), None)


def test_a_run_is_named_by_its_folder_or_by_its_config(tmp_path: Path) -> None:
    config, run = tmp_path / "c.yaml", tmp_path / "run"
    write_text(config, dump_config(build_config({**TREE, "run_dir": str(run)}, "here")))
    with pytest.raises(ConfigError, match=f"kdscale run {config} starts it"):
        run_folder(str(config))
    write_text(run / "config.yaml", "name: t\n")
    assert run_folder(str(config)) == run_folder(str(run)) == run
    with pytest.raises(ConfigError, match="there is no run in"):
        run_folder(str(tmp_path))
