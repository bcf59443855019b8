"""`kdscale export`: the student of any checkpoint, from its files alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdscale.config.load import dump_config
from kdscale.distill import trainer
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.export import export_run
from kdscale.errors import CheckpointError, RunFolderError
from kdscale.runtime.progress import Reporter

ROOT = Path(__file__).resolve().parents[3]
QUIET = Reporter(quiet=True)
# keeps what a run leaves: nothing may have been started that a plain file reader does not need
CHILD = """
import sys
from pathlib import Path
from kdscale.cli.main import make_app
make_app()(sys.argv[1:], standalone_mode=False)
import torch.distributed as dist
assert not dist.is_initialized()
assert "deepspeed" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture(scope="module")
def ended(distil, make_config, student_dir, tmp_path_factory):
    """A run folder whose distillation ended after 8 steps."""
    run, settings = tmp_path_factory.mktemp("ended"), {"checkpoint_every": 2, "keep_every": 4, "dtype": "bfloat16"}
    distil(run, **settings)
    shutil.copytree(student_dir, run / "pruned")
    (run / "config.yaml").write_text(dump_config(make_config(**settings)))
    return run


@pytest.fixture
def finished(ended, tmp_path):
    """A copy of it to do something with."""
    return shutil.copytree(ended, tmp_path / "run")


def content(folder):
    return {item.name: item.read_bytes() for item in sorted(folder.iterdir())}


def test_the_newest_checkpoint_is_the_student(finished):
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "export", str(finished)],
        capture_output=True, text=True, check=False, timeout=100, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert content(finished / "exported" / "step-00000008") == content(finished / "student")


def test_an_earlier_one_is_what_the_student_was_then(finished, tmp_path):
    export_run(finished, 4, tmp_path / "out", QUIET)
    was, then = load_file(tmp_path / "out/model.safetensors"), load_file(finished / "student/model.safetensors")
    assert was.keys() == then.keys()
    assert not any(torch.equal(was[name], then[name]) for name in was)
    assert "| optimiser steps | 4 |" in (tmp_path / "out/README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_cannot_be_exported_is_refused(finished, tmp_path):
    with pytest.raises(RunFolderError, match="no checkpoint of step 5") as caught:
        export_run(finished, 5, None, QUIET)
    assert "one of 8, 6, 4" in str(caught.value)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("do not touch")
    with pytest.raises(RunFolderError, match="is there already"):
        export_run(finished, None, tmp_path / "thesis", QUIET)
    with pytest.raises(RunFolderError, match="not a run folder"):
        export_run(tmp_path, None, None, QUIET)
    config = finished / "pruned" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match="the student that was distilled"):
        export_run(finished, None, None, QUIET)


def test_a_damaged_newest_one_is_passed_over_unless_it_was_asked_for(finished, tmp_path):
    victim = checkpoint_folder.step_dir(finished / "checkpoints", 8) / checkpoint_folder.rank_file(0)
    data = bytearray(victim.read_bytes())
    data[5000] ^= 1
    victim.write_bytes(data)
    export_run(finished, None, tmp_path / "out", QUIET)
    assert "| optimiser steps | 6 |" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(CheckpointError, match="step-00000008"):
        export_run(finished, 8, tmp_path / "other", QUIET)


def test_a_model_whose_names_are_not_on_disk_is_refused_before_training(distil, student_dir, tmp_path, monkeypatch):
    """With a name that the model does not have, its training would be lost: an error before the first step."""
    other = tmp_path / "other"
    shutil.copytree(student_dir, other)
    tensors = load_file(other / "model.safetensors")
    tensors["old.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(trainer.Trainer, "_one_step", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        distil(tmp_path / "run", student=other)
    assert json.loads((other / "config.json").read_text())["model_type"] == "llama"
