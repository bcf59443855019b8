"""benchmarks/quality/run.py on a tiny teacher: cells of both methods, before and after a distillation."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

from kdscale.files import read_json

pytest.importorskip("lm_eval")
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"
SIZES = {
    "tiny": {
        "shapes": {"ffn": {"ffn": 64}},
        "distill": {
            "seq_len": 32, "global_batch": 2, "micro_batch": 2, "optimizer": {"lr": 4e-4, "min_lr": 4e-5},
        },
        "seconds_to_prune": 1, "tokens_per_second": 1000,
        "importance": {"calibration_tokens": 512, "seq_len": 64, "layer_tokens": 256},
    }
}  # fmt: skip


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("run")
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
                del sys.modules[name]


@pytest.fixture
def bench(
    run: ModuleType, kdscale: Callable[..., Any], tiny_llama_dir: Path, tiny_texts: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[str]]:  # fmt: skip
    """Calls the bench with these options; returns the stages that it ran, as `kdscale` was called."""
    rng, words = random.Random(1), " ".join(tiny_texts).split()
    records = [{"text": " ".join(rng.choices(words, k=90)), "source": kind} for kind in "abc" for _ in range(24)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    called: list[str] = []

    class Forked:
        """A process of `kdscale` that is forked, not started: that takes a second instead of ten."""

        def __init__(self, command: list[str], stdout: Any, stderr: Any):
            called.append(f"{command[3]} {Path(command[4]).stem}")
            done = kdscale(*command[3:])
            stdout.write(done.out + done.err)
            self._code = done.code

        def wait(self, timeout: float | None = None) -> int:
            return self._code

        poll = wait

    monkeypatch.setattr(sys.modules["making"], "Popen", Forked)
    monkeypatch.setattr(run, "commit", lambda: "abc")
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(run, "set_threads", lambda _: None)
    for variable in ("KDSCALE_CACHE", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # the bench sets them; this puts them back

    def call(*options: str) -> list[str]:
        called.clear()
        folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        text = [
            "--corpus",
            str(tmp_path / "corpus.jsonl"),
            "--other",
            "c",
            "--seq-len",
            "64",
            "--items",
            "2",
            "--tasks",
            "builtin:cloze",
        ]
        teacher = ["--teachers", f"tiny={tiny_llama_dir}", "--sizes", str(tmp_path / "sizes.json"), "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", ["run.py", *folders, *text, *teacher, *options])
        with pytest.raises(SystemExit) as ended:
            run.main()
        assert not ended.value.code, ended.value.code
        return list(called)

    return call


@pytest.mark.long
def test_cells_before_and_after_a_distillation(
    bench: Callable[..., list[str]], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    options, start = ("--shapes", "ffn", "--methods", "minitron", "--budgets", "0", "128"), "tiny.ffn.minitron.s1"
    assert bench(*options) == [f"prune {start}", f"prune {start}", f"distill {start}.128"]
    cells = {path.stem: read_json(path) for path in (tmp_path / "results").glob("*.json")}
    assert set(cells) == {"tiny.teacher.s1", f"{start}.0", f"{start}.128"}
    before, after = cells[f"{start}.0"], cells[f"{start}.128"]
    assert before["start"] == after["start"] and before["commit"] == "abc"
    for text in ("known", "other"):
        dense = cells["tiny.teacher.s1"][text]["perplexity"]
        assert before[text]["perplexity"] != after[text]["perplexity"] and after[text]["kl"] > 0
        assert after[text]["ratio"] == pytest.approx(after[text]["perplexity"] / dense, rel=1e-4)
    assert after["accuracy"]["items"] == 2 and {"prune", "distill", "measure"} == set(after["seconds"])
    assert not (tmp_path / "work" / "runs" / f"{start}.128").exists(), "a finished cell leaves no run folder"
    assert bench(*options) == [], "all of it is there"

    # The recipe copies what it keeps, whatever the defaults are: every weight of its student is one of the teacher's.
    pruned = tmp_path / "work" / "runs" / start
    kept = read_json(pruned / "plan.json")["kept"]["ffn"]
    teacher, student = (load_file(folder / "model.safetensors") for folder in (tiny_llama_dir, pruned / "pruned"))
    for layer, units in enumerate(kept):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert student[name].equal(teacher[name][:, units])

    # A cell of other settings is made again.
    before["settings"]["prune"]["compensate"] = "ridge"
    (tmp_path / "results" / f"{start}.0.json").write_text(json.dumps(before))
    assert bench(*options[:-1]) == [f"prune {start}"]
    assert read_json(tmp_path / "results" / f"{start}.0.json")["settings"]["prune"]["compensate"] == "none"
