"""The config that a command is given."""

from __future__ import annotations

from pathlib import Path

from kdscale.cli.arguments import load
from kdscale.config.load import build_config, dump_config
from kdscale.files import write_text

TREE = {"name": "t", "run_dir": "/old/place", "teacher": {"path": "t"}, "prune": {"ffn": 64}}


def test_the_config_of_a_moved_run_folder_is_of_the_run_where_it_is(tmp_path: Path) -> None:
    moved = tmp_path / "a: moved [run]"
    write_text(moved / "config.yaml", dump_config(build_config(TREE, "here")))
    assert load(str(moved / "config.yaml"), None).run_dir == "/old/place"  # a config that only has that name
    write_text(moved / "events.jsonl", "")
    assert load(str(moved / "config.yaml"), None).run_dir == str(moved)
    assert load(str(moved / "config.yaml"), ["run_dir=/new"]).run_dir == "/new"
