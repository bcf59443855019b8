"""Heads that predict several tokens ahead: left out, or kept beside a student that is cut by depth alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.models.loading import load_model, open_teacher
from kdscale.prune import self_check
from kdscale.prune.apply import apply_plan
from kdscale.prune.search.planning import make_plan
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import edit_config, random_scores, save_teacher

IDS = torch.arange(24).reshape(2, 12) % 64


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_teacher("qwen3", tmp_path_factory.mktemp("mtp"))
    head = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.randn(48, 32)}
    save_file({**load_file(folder / "model.safetensors"), **head}, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, num_nextn_predict_layers=1)
    return folder


def prune(folder: Path, out: Path, **settings: Any) -> dict[str, Any]:
    cfg = PruneConfig(compensate="none", layer_repair="none", **settings)
    checkpoint, family = open_teacher(folder, keep_heads=cfg.keep_mtp)
    plan = make_plan(checkpoint.config, family, random_scores(checkpoint.config, family), cfg)
    out.mkdir()
    apply_plan(checkpoint, family, plan, out, cfg, reporter=Reporter(quiet=True))
    assert max(self_check.self_check(checkpoint, family, plan, out, IDS).values()) < 1e-5
    return json.loads((out / "config.json").read_text())


def test_a_student_cut_by_depth_keeps_them_byte_for_byte(teacher: Path, tmp_path: Path) -> None:
    config = prune(teacher, tmp_path / "kept", layers=2, keep_mtp=True)
    assert (config["num_nextn_predict_layers"], config["num_hidden_layers"]) == (1, 2)
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "kept"))
    heads = [name for name in before if name.startswith("mtp.")]
    assert len(heads) == 2
    assert all(torch.equal(before[name], after[name]) for name in heads)
    load_model(tmp_path / "kept", dtype=torch.float32, device=torch.device("cpu"))
    config = prune(teacher, tmp_path / "left", layers=2)
    assert config["num_nextn_predict_layers"] == 0
    assert not any(name.startswith("mtp.") for name in load_file(tmp_path / "left" / "model.safetensors"))


@pytest.mark.parametrize("cut", [{"ffn": 32}, {"hidden": 24}, {"kv_heads": 1}])
def test_cuts_that_they_would_not_fit_are_refused(teacher: Path, tmp_path: Path, cut: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"multi-token-prediction head is kept \(prune\.keep_mtp\)(.|\n)*only layers"):
        prune(teacher, tmp_path / "cut", **cut, keep_mtp=True)


def test_a_teacher_without_them_is_refused(tmp_path: Path) -> None:
    plain = save_teacher("qwen3", tmp_path / "plain")
    with pytest.raises(ConfigError, match="none in"):
        open_teacher(plain, keep_heads=True)
    with pytest.raises(ConfigError, match=r"prune\.keep_mtp(.|\n)*llama"):
        open_teacher(save_teacher("llama", tmp_path / "llama"), keep_heads=True)
