"""A teacher in shards or in host memory gives the bits of the whole one, and no rank holds more than it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdscale.errors import CheckpointError, ConfigError
from kdscale.teacher.placement.placed import place_teacher

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).parent / "placement_worker.py"
CPU = torch.device("cpu")
CASES = ["llama tied", "llama whole", "llama tied whole", "gemma2 tied", "gpt2 tied", "mixtral", "gpt_neox",
         "offloaded llama", "offloaded gemma2 tied"]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(world, rank) → case → figures."""
    folder = tmp_path_factory.mktemp("placed")
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)], env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-12000:]
    answers = {tuple(map(int, file.stem.split("-"))): json.loads(file.read_text()) for file in folder.glob("*-*.json")}
    assert sorted(answers) == [(world, rank) for world in (1, 2, 4) for rank in range(world)]
    return answers


@pytest.mark.parametrize("case", CASES)
def test_every_placement_gives_the_bits_of_the_whole_model(found, case):
    """Other batches on every rank, one of them without a label; vocabularies that no world divides."""
    assert list(next(iter(found.values()))) == CASES
    assert [place for place, cases in found.items() if not cases[case]["equal"]] == []
    assert {cases[case]["vocab"] for cases in found.values()} == {61}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_share_and_two_layers(found, case):
    for (world, _), cases in found.items():
        figures = cases[case]
        kept = figures["head"] if "whole" in case else 0
        assert figures["resident"] < kept + 0.16 * figures["whole"]  # norms, and GPT-2's table of positions
        assert figures["most"] <= figures["resident"] + max(figures["layer"], figures["head"])
        if "offloaded" not in case:
            share = (figures["whole"] - figures["resident"]) / world
            assert share <= figures["stored"] <= share + 4 * 64 + 64 * 12 + 64  # rounding up: rows, values, alignment
            assert figures["buffers"] <= (0 if world == 1 else 2 * (figures["layer"] + world))


def test_a_teacher_that_cannot_be_placed_is_refused_before_its_weights_are_read(tmp_path, tiny_llama_dir):
    for file in tiny_llama_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(
        ConfigError, match=r"distill\.teacher_placement(.|\n)*offloaded(.|\n)*quantization_config: None\n"
    ):
        place_teacher(tmp_path, "offloaded", dtype=torch.float32, device=CPU)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ConfigError, match=r"partitioned(.|\n)*unheard_of(.|\n)*replicated"):
        place_teacher(tmp_path, "partitioned", dtype=torch.float32, device=CPU)


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path, tiny_llama_dir, monkeypatch):
    from kdscale.models import skeleton
    from kdscale.teacher.placement import placed

    for file in tiny_llama_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    real = skeleton.build_skeleton

    def cut(*args, **kwargs):
        with (tmp_path / "model.safetensors").open("r+b") as stream:
            stream.truncate(100_000)
        return real(*args, **kwargs)

    monkeypatch.setattr(placed, "build_skeleton", cut)
    with pytest.raises(CheckpointError, match="cut short"):
        place_teacher(tmp_path, "partitioned", dtype=torch.float32, device=CPU)
