"""`kdscale chat` and `kdscale export-gguf` on a run folder: what they print and refuse."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kdscale.cli.chat import _Session
from kdscale.cli.main import make_app
from kdscale.errors import ConfigError
from kdscale.eval.chat import Answer

CONFIG = """
name: tiny
run_dir: {run}
teacher: {{path: {teacher}}}
data: {{sources: [{{path: {run}}}]}}
prune: {{ffn: 64}}
eval: {{sample_temperature: 0.0}}
runtime: {{device: cpu}}
"""


@pytest.fixture
def run(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A run with a student and no pruned model yet."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_llama_dir, folder / "student")
    (folder / "config.yaml").write_text(CONFIG.format(run=folder, teacher=tiny_llama_dir))
    (folder / "events.jsonl").write_text("")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(*arguments: object, typed: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        make_app()(list(map(str, arguments)), standalone_mode=False)
        return "".join(capsys.readouterr())

    return run


def test_one_question_is_answered_by_all_models_that_are_there(run: Path, call: Callable[..., str]) -> None:
    printed = call("chat", run, "--prompt", "the mill", "--max-tokens", 4)
    assert "note: without the pruned model" in printed
    said = dict(line.split(": ", 1) for line in printed.splitlines() if line.startswith(("teacher", "distilled")))
    assert said["teacher"] == said["distilled"]  # one is a copy of the other


def test_commands_are_obeyed_and_a_wrong_one_ends_nothing(run: Path, call: Callable[..., str]) -> None:
    typed = "the mill\n/models distilled\n/temperature hot\n/fly\n/reset\nthe mill\n/quit\nnever asked\n"
    printed = call("chat", run, "--max-tokens", 3, typed=typed)
    lines = printed.splitlines()
    answers = [line.split(": ", 1) for line in lines if line.startswith(("teacher: ", "distilled: "))]
    assert [name for name, _ in answers] == ["teacher", "distilled", "distilled"]
    assert answers[1] == answers[2]  # a new conversation, greedy
    assert "error: /temperature" in printed and "error: /fly" in printed
    assert "never asked" not in printed


def test_models_are_named_or_refused(run: Path, call: Callable[..., str]) -> None:
    assert "teacher:" not in call("chat", run, "--models", "distilled", "--prompt", "x", "--max-tokens", 1)
    with pytest.raises(ConfigError, match=r"pruned model of .* is not there yet"):
        call("chat", run, "--models", "pruned", "--prompt", "x")
    with pytest.raises(ConfigError, match="one of teacher, pruned, distilled"):
        call("chat", run, "--models", "best", "--prompt", "x")


@pytest.mark.parametrize("width", [100, 40])
def test_what_a_model_says_neither_steers_the_terminal_nor_is_markup(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True)
    session = _Session(console, None, [], 1, None)  # type: ignore[arg-type]
    answers = {"teacher": Answer("\x1b[2J[bold]ha[/bold]", 3, 0.5), "distilled": Answer("\u202eab", 0, 0.0, True)}
    console.print(session._shown(answers))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in shown and "\u202e" not in shown
    assert r"\x1b[2J[bold]ha[/bold]" in shown and r"\u202eab" in shown
    assert "6.0 tok/s" in shown and "no answer" in shown
    in_columns = any("teacher" in line and "distilled" in line for line in shown.splitlines())
    assert in_columns == (width == 100)


def test_a_model_of_a_run_becomes_a_gguf_file(run: Path, call: Callable[..., str]) -> None:
    pytest.importorskip("gguf")
    printed = call("export-gguf", run, "--type", "BF16")
    assert (run / "exported" / "distilled-bf16.gguf").read_bytes()[:4] == b"GGUF"
    assert "29 in bf16, 9 in f32" in printed
    with pytest.raises(ConfigError, match="pruned model of"):
        call("export-gguf", run, "--model", "pruned")
    with pytest.raises(ConfigError, match="--model"):
        call("export-gguf", run / "student", "--model", "pruned")
    call("export-gguf", run / "student", "--type", "q8_0", "--out", run / "s.gguf")
    assert (run / "s.gguf").is_file()
