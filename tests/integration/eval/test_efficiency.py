"""Speed and memory: each model in a process of its own, all in turn; failures carry the child's words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kdscale.config.evaluation.settings import EvalConfig
from kdscale.errors import CheckpointError, ConfigError, Interrupted, MachineError
from kdscale.eval import efficiency, sizes
from kdscale.runtime.progress import Reporter

QUIET = Reporter(quiet=True)
CONFIG = EvalConfig(prefill_tokens=16, decode_tokens=4)


def test_models_are_measured_in_turn(tiny_llama_dir: Path) -> None:
    models = {"teacher": tiny_llama_dir, "pruned": tiny_llama_dir}
    found = efficiency.measure(models, CONFIG, device="cpu", threads=1, reporter=QUIET, repeats=2)
    assert list(found) == ["teacher", "pruned"]
    for figures in found.values():
        low, high = figures["decode_tokens_per_second_range"]
        assert 0 < low <= figures["decode_tokens_per_second"] <= high
        assert figures["prefill_tokens_per_second"] > 0
        assert figures["peak_memory_bytes"] > figures["peak_memory_before_loading_bytes"] > 0
        assert (figures["prefill_tokens"], figures["decode_tokens"], figures["repeats"]) == (16, 4, 2)
        assert figures["interleaved"] is True


def test_models_that_do_not_fit_together_run_one_after_another(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "_SHARE_OF_FREE_MEMORY", 0.0)
    models = {"teacher": tiny_llama_dir, "pruned": tiny_llama_dir}
    found = efficiency.measure(models, CONFIG, device="cpu", threads=1, reporter=QUIET, repeats=1)
    assert [figures["interleaved"] for figures in found.values()] == [False, False]


def test_a_model_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"measuring .* failed[\s\S]*safetensors"):
        efficiency.measure({"teacher": tmp_path}, CONFIG, device="cpu", threads=1, reporter=QUIET, repeats=1)


CHILD = """
import os, resource, sys
sys.stdin.readline()
if "exit" in sys.argv[1]:
    print("its own words", file=sys.stderr)
    sys.exit(int(sys.argv[1].removeprefix("exit")))
os.kill(os.getpid(), int(sys.argv[1].removeprefix("signal")))
"""


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        ("exit3", CheckpointError, "its own words"), ("exit2", ConfigError, "its own words"),
        ("exit1", RuntimeError, "its own words"), ("signal9", MachineError, "ended by SIGKILL"),
        ("signal11", MachineError, "SIGSEGV"), ("signal2", Interrupted, "SIGINT"),
    ],
)  # fmt: skip
def test_a_process_that_ends_early_is_an_error_of_its_kind(end: str, error: type[BaseException], words: str) -> None:
    command = [sys.executable, "-c", CHILD, end]
    with efficiency.worker(Path("model"), command) as child, pytest.raises(error, match=words) as caught:
        child.take_turn()
    assert caught.type is error


def test_too_little_memory_is_an_error_of_the_machine(tiny_llama_dir: Path) -> None:
    """As long as there is too little, by the process's own limit: what it prints is one line and no trace."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n{_RUN_MODULE}"
    command = [sys.executable, "-c", limited, str(tiny_llama_dir), "--in-turns", "--prefill-tokens", str(10**9)]
    with efficiency.worker(tiny_llama_dir, command) as child, pytest.raises(MachineError, match="memory") as caught:
        child.take_turn()
    assert "Traceback" not in str(caught.value)


_RUN_MODULE = "import runpy; runpy.run_module('kdscale.eval.efficiency', run_name='__main__')"


def test_the_command_prints_one_json_line(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    efficiency.main(
        [str(tiny_llama_dir), "--repeats", "1", "--prefill-tokens", "8", "--decode-tokens", "2", "--threads", "1"]
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["repeats"] == 1
