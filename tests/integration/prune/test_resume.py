"""Killed inside importance or apply: taken up at the last finished layer, with the bytes of an unbroken run."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.config.load import load_config
from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.config.root import Config
from kdscale.models import layer_pass
from kdscale.models.hidden_states import Scratch
from kdscale.models.layer_pass import LayerPass
from kdscale.models.layer_stream import LayerStream
from kdscale.pipeline.runner import run_until
from kdscale.prune.apply import apply_plan
from kdscale.prune.importance import collect
from kdscale.prune.search.planning import make_plan
from kdscale.runtime.progress import Reporter

ALL = {
    "target_params": "50%", "axes": ("ffn", "heads", "kv_heads", "hidden", "layers"),
    "layer_method": "block_influence",
}  # fmt: skip
CUT = {"ffn": 64, "heads": 4, "hidden": 64, "layers": 3, "layer_repair": "none"}
BUDGETS = {"in memory": 1 << 30, "one batch in memory": 3 * 48 * 96 * 4, "all on disk": 1}


class Killed(BaseException):
    """What a kill is to the code: nothing that it could catch."""


def _die_at(monkeypatch, layer: int) -> list[int]:
    """LayerStream.layer raises at `layer`; returns the list of the layers that were read."""
    read = LayerStream.layer
    seen: list[int] = []

    def spy(self, index):
        seen.append(index)
        if index == layer:
            raise Killed
        return read(self, index)

    monkeypatch.setattr(LayerStream, "layer", spy)
    return seen


def _files(folder: Path) -> dict[str, str]:
    return {item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in sorted(folder.iterdir())}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_importance_goes_on_at_the_last_finished_layer(teacher, tmp_path, monkeypatch, layer, budget):
    expected = teacher.scores(tmp_path / "whole", **ALL)
    scratch = Scratch(tmp_path / "scratch", BUDGETS[budget])

    def run() -> dict[str, np.ndarray]:
        cfg, silent = ImportanceConfig(dtype="float32"), Reporter(quiet=True)
        cpu = torch.device("cpu")
        return collect.score_teacher(
            teacher.checkpoint, teacher.family, teacher.batches, cfg, PruneConfig(**ALL), tmp_path / "scores", cpu,
            silent, scratch,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        _die_at(patch, layer)
        with pytest.raises(Killed):
            run()
    # only the newest states are kept
    assert [item.name for item in scratch.folder.glob("states-*")] == ([f"states-{layer}.bin"] if layer else [])
    with monkeypatch.context() as patch:
        seen = _die_at(patch, -1)
        scores = run()
    assert seen == list(range(layer, 4))
    assert all(np.array_equal(scores[name], expected[name]) for name in expected)
    assert _files(tmp_path / "scores") == _files(tmp_path / "whole")
    assert not any(scratch.folder.iterdir())


@pytest.mark.parametrize(
    ("layer", "compensate", "cheap"),
    [(layer, compensate, True) for layer in (1, 2) for compensate in ("two_stream", "ridge", "none")]
    + [(2, "two_stream", False), (2, "ridge", False)],
)
def test_apply_goes_on_at_the_last_saved_layer(teacher, tmp_path, monkeypatch, layer, compensate, cheap):
    """Every layer is saved where that is cheap; otherwise here the first alone, and the others are done again."""
    if not cheap:
        monkeypatch.setattr(layer_pass, "_CHEAP_BYTES", 0)
        monkeypatch.setattr(layer_pass, "_WORK_PER_SAVE", 1e12)
    cfg = PruneConfig(**CUT, compensate=compensate, max_shard_bytes=60_000)
    plan = make_plan(teacher.config, teacher.family, teacher.scores(tmp_path / "s", **CUT), cfg)
    source, scratch = teacher.checkpoint, Scratch(tmp_path / "scratch", BUDGETS["one batch in memory"])

    def run(out: Path, scratch: Scratch) -> None:
        silent = Reporter(quiet=True)
        apply_plan(source, teacher.family, plan, out, cfg, batches=teacher.batches, reporter=silent, scratch=scratch)

    run(tmp_path / "whole", Scratch())
    victim = f"model.layers.{plan.kept.layers[layer]}.mlp.down_proj.weight"
    with monkeypatch.context() as patch:
        _spy_on_tensors(patch, victim)
        with pytest.raises(Killed):
            run(tmp_path / "student", scratch)
    assert not (tmp_path / "student" / "config.json").exists()
    with monkeypatch.context() as patch:
        read = _spy_on_tensors(patch, None)
        run(tmp_path / "student", scratch)
    again = {int(name.split(".")[2]) for name in read if ".layers." in name}
    first = plan.kept.layers[layer] if cheap else 1
    assert min(again) == first if compensate != "none" else plan.kept.layers[0] not in again
    assert _files(tmp_path / "student") == _files(tmp_path / "whole")


def _spy_on_tensors(monkeypatch, victim: str | None) -> list[str]:
    from kdscale.weights import Checkpoint

    read: list[str] = []
    whole, blocks = Checkpoint.tensor, Checkpoint.blocks

    def look(name):
        read.append(name)
        if name == victim:
            raise Killed

    def tensor(self, name):
        look(name)
        return whole(self, name)

    def in_blocks(self, name, max_bytes):
        look(name)
        return blocks(self, name, max_bytes)

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    monkeypatch.setattr(Checkpoint, "blocks", in_blocks)
    return read


def test_other_files_than_the_pass_knows_are_begun_anew(teacher, tmp_path):
    """The layers that compensation has done are in the student's files: without those they must be done again."""
    cfg = PruneConfig(**CUT)
    plan = make_plan(teacher.config, teacher.family, teacher.scores(tmp_path / "s", **CUT), cfg)
    scratch = Scratch(tmp_path / "scratch")
    stream = LayerStream(
        teacher.config, teacher.family, teacher.checkpoint.tensor, dtype=torch.float32, device=torch.device("cpu")
    )
    walk = LayerPass(stream, teacher.batches, scratch.subfolder("compensation"))
    for layer in walk.layers(2):
        walk.run(layer)
        walk.finish()
    for out, where in ((tmp_path / "student", scratch), (tmp_path / "whole", Scratch())):
        apply_plan(teacher.checkpoint, teacher.family, plan, out, cfg, batches=teacher.batches, scratch=where)
    assert _files(tmp_path / "student") == _files(tmp_path / "whole")


_CHILD = """
import sys
from pathlib import Path
from kdscale.config.load import load_config
from kdscale.runtime.progress import Reporter
from kdscale.pipeline.runner import run_until
run_until(load_config(Path(sys.argv[1])), "prune", Reporter(quiet=True))
"""


def test_stages_resume_in_their_work_folders(tiny_config, tmp_path, kdscale_environment, monkeypatch):
    """Importance stopped at the third layer, prune killed outright after the first; then inputs that changed."""
    silent = Reporter(quiet=True)
    config = load_config(tiny_config)
    run = Path(config.run_dir)

    def resumed(stage: str, config: Config) -> list[int]:
        with monkeypatch.context() as patch:
            seen = _die_at(patch, -1)
            run_until(config, stage, silent, accept_changes=True)
        return seen

    def stopped(stage: str, config: Config) -> None:
        with monkeypatch.context() as patch:
            _die_at(patch, 2)
            with pytest.raises(Killed):
                run_until(config, stage, silent, accept_changes=True)
        assert (run / "work" / stage).is_dir()
        assert not (run / "stages" / f"{stage}.json").exists()

    run_until(load_config(tiny_config, [f"run_dir={tmp_path / 'unbroken'}"]), "prune", silent)
    stopped("importance", config)
    assert resumed("importance", config) == [2, 3]
    assert _files(run / "importance") == _files(tmp_path / "unbroken" / "importance")

    process = subprocess.Popen([sys.executable, "-c", _CHILD, str(tiny_config)], env=kdscale_environment)
    while process.poll() is None and not any((run / "work" / "prune").glob("1-ranks/rank-0/compensation/progress-*")):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "stages" / "prune.json").exists()
    assert resumed("prune", config)[0] > 0
    assert _files(run / "pruned") == _files(tmp_path / "unbroken" / "pruned")
    assert not (run / "work").exists()

    stopped("importance", load_config(tiny_config, ["seed=3"]))
    assert resumed("importance", load_config(tiny_config, ["seed=4"])) == [0, 1, 2, 3]
