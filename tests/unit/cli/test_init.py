"""`kdscale init`: what it asks, what it checks, and what it writes."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import typer

from kdscale.cli.init import init_command
from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError, DataError, FileError, KdscaleError
from kdscale.pipeline.runner import run_until
from kdscale.runtime.progress import Reporter

Init = Callable[..., None]
Terminal = Callable[..., list[str]]


@pytest.fixture
def init(tmp_path: Path, tiny_llama_dir: Path, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Init:
    """The command in a folder with a text and a teacher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_texts * 60), encoding="utf-8")
    Path("teachers").mkdir()
    Path("teachers/Tiny").symlink_to(tiny_llama_dir)
    options = {"teacher": "teachers/Tiny", "target_params": "80%", "data": ["text.txt"]}
    return lambda **changed: init_command(**{**options, **changed})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """`terminal(answers)` answers questions; what it returns becomes the questions, with their defaults."""

    def start(*answers: str) -> list[str]:
        asked: list[str] = []
        left = list(answers)

        def prompt(question: str, default: str | None = None) -> str:
            asked.append(f"{question} [{default}]")
            return left.pop(0) or default or ""

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(typer, "prompt", prompt)
        return asked

    return start


def written(name: str) -> Config:
    return load_config(Path(name))


def test_options_alone_write_a_config_that_plans(init: Init, capfd: pytest.CaptureFixture[str]) -> None:
    init(out=Path("my.yaml"))
    config = written("my.yaml")
    assert (config.name, config.run_dir) == ("my", "runs/my")
    assert config.prune.target == ("target_params", "80%")
    assert [source.path for source in config.data.sources] == ["text.txt"]
    assert "next:    kdscale plan my.yaml" in capfd.readouterr().out
    said = set(config.model_dump(exclude_defaults=True))
    assert said == {"name", "run_dir", "teacher", "data", "prune"}
    smaller = ["importance.calibration_tokens=256", "importance.seq_len=64", "prune.search.masked_candidates=2"]
    smaller += ["prune.search.masked_tokens=64"]
    assert run_until(load_config(Path("my.yaml"), smaller), "plan", Reporter(quiet=True))


def test_without_a_name_a_free_one_is_made_of_teacher_and_size(init: Init) -> None:
    init()
    (first,) = Path().glob("*.yaml")
    assert first.stem.startswith("tiny-to-")
    Path("runs", f"{first.stem}-2").mkdir(parents=True)
    init()
    assert written(f"{first.stem}-3.yaml").run_dir == f"runs/{first.stem}-3"


def test_nothing_is_overwritten_without_force(init: Init) -> None:
    Path("my.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="--force overwrites it"):
        init(out=Path("my.yaml"))
    assert Path("my.yaml").read_text() == "mine"
    init(out=Path("my.yaml"), force=True)
    assert written("my.yaml").name == "my"


def test_an_axis_is_opened_where_the_size_needs_it(init: Init) -> None:
    init(target_params="30%", out=Path("my.yaml"))
    assert "hidden" in written("my.yaml").prune.axes


@pytest.mark.parametrize(
    ("changed", "error", "parts"),
    [
        ({"teacher": None, "data": None}, ConfigError, ["--teacher MODEL", "--data PATH", "no terminal"]),
        ({"target_params": None}, ConfigError, ["--target-params SIZE or --target-bytes SIZE"]),
        ({"target_bytes": "1GB"}, ConfigError, ["got:      both"]),
        ({"target_params": "3 apples"}, ConfigError, ["prune.target_params: expected a count such as 4B"]),
        ({"target_params": "1"}, ConfigError, ["within 3% of a reachable size"]),
        ({"teacher": "org/name", "data": ["/nowhere"]}, ConfigError, ["hf:org/name?", "/nowhere does not exist"]),
        ({"data": ["text.txt", "other.txt"]}, DataError, ["other.txt does not exist"]),
        ({"run_dir": "text.txt"}, ConfigError, ["text.txt is a file"]),
        ({"run_dir": "a\nb"}, ConfigError, ["run_dir: expected text without control characters"]),
        ({"teacher": "x" * 300}, FileError, ["xxx cannot be read"]),
        ({"data": ["x" * 300, "text.txt"], "run_dir": "y" * 300}, FileError, ["xxx cannot be", "yyy cannot be"]),
        ({"out": Path("x" * 300)}, ConfigError, ["the name of a file"]),
        ({"out": Path("no/my.yaml")}, ConfigError, ["a file in a folder that exists"]),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(
    init: Init, changed: dict[str, Any], error: type[KdscaleError], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        init(**changed)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert list(Path().glob("*.yaml")) == []


def test_of_a_hub_teacher_only_the_config_is_fetched(
    init: Init, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        Path("hub").mkdir(exist_ok=True)
        shutil.copy(tiny_llama_dir / "config.json", "hub")
        return "hub"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    init(teacher="hf:org/Tiny")
    assert asked == [("org/Tiny", ["config.json"])]
    (file,) = Path().glob("*.yaml")
    assert file.name.startswith("tiny-to-")
    assert written(file.name).teacher.path == "hf:org/Tiny"


def test_the_folder_of_another_run_is_refused(init: Init) -> None:
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/config.yaml").write_text("name: old\n")
    with pytest.raises(ConfigError, match="which holds one"):
        init(run_dir="runs/old")


def test_questions_are_asked_until_the_answer_can_be_used(
    init: Init, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = terminal("org/name", "", "3 apples", "400kB", "nowhere", "text.txt", "text.txt", "runs/here")
    init(teacher=None, target_params=None, data=None)
    assert [question.split()[0] for question in asked] == [
        *["Teacher,"] * 2, *["How"] * 2, *["Text,"] * 2, *["Run"] * 2
    ]  # fmt: skip
    assert asked[0].endswith("[teachers/Tiny]")
    assert "did you mean hf:org/name?" in capsys.readouterr().out
    (file,) = Path().glob("*.yaml")
    config = written(file.name)
    assert (config.run_dir, config.prune.target) == ("runs/here", ("target_bytes", "400kB"))


def test_only_what_no_option_gives_is_asked(init: Init, terminal: Terminal) -> None:
    asked = terminal("", "")
    init(teacher=None)
    assert [question.split()[0] for question in asked] == ["Teacher,", "Run"]


@pytest.mark.parametrize("path", ["a b", "it's: #1", "null", "1e9", "[x]", "- y", 'quote"d', "ümlaut"])
def test_any_path_is_read_back_as_it_was_given(init: Init, path: str) -> None:
    Path(f"{path}.txt").write_text("text")
    Path(path).mkdir()
    Path(path, "t.txt").write_text("text")
    init(data=[path, f"{path}.txt"], run_dir=f"runs/{path}", out=Path("my.yaml"))
    assert [source.path for source in written("my.yaml").data.sources] == [path, f"{path}.txt"]
    assert written("my.yaml").run_dir == f"runs/{path}"


def test_the_end_of_the_input_at_a_question_is_no_trace(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "kdscale.cli.main", "init"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        while not shown.endswith(b"hf:org/name: "):
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 1)
        os.write(ours, b"\x04")  # Ctrl-D
        process.wait(60)
    assert os.read(ours, 100) == b"\r\nstopped\r\n"
    os.close(ours)
    assert process.returncode == 130
