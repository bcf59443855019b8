"""A whole run on a hybrid: layers of three kinds, a search on the heads of its mixers, packed text, the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kdscale.config.load import load_config
from kdscale.files import read_json
from kdscale.models.loading import load_model
from kdscale.pipeline.runner import run_until
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import save_teacher

QUIET = Reporter(quiet=True)


@pytest.mark.long
def test_a_hybrid_is_searched_cut_distilled_and_reported(
    tiny_config: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import torch

    kinds = ["linear_attention", "full_attention", "linear_attention", "mlp"]
    teacher = save_teacher("nemotron_h", tmp_path / "teacher", vocab_size=320, layers_block_type=kinds)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama_dir / name, teacher / name)
    quick = [
        f"teacher.path={teacher}", "prune={target_params: 85%, axes: [ssm_heads, ssm_head_dim, ffn], ffn_divisor: 16}",
        "prune.search.masked_candidates=2", "eval.efficiency=false", "eval.prompts=[]", "distill.tokens=1280",
    ]  # fmt: skip
    config = load_config(tiny_config, quick)
    assert run_until(config, "report", QUIET)
    run = RunFolder(Path(config.run_dir))
    plan = read_json(run.path / "plan.json")
    student, kept = plan["student"], plan["kept"]
    assert student["ssm_heads"] * student["ssm_head_dim"] < 6 * 8
    assert abs(plan["target"]["off_by"]) <= 0.03
    assert [bool(heads) for heads in kept["ssm_heads"]] == [True, False, True, False]
    assert [bool(units) for units in kept["ffn"]] == [False, False, False, True]
    model = load_model(run.student, dtype=torch.float32, device=torch.device("cpu"))
    assert sum(p.numel() for p in model.parameters()) == plan["student_params"]["total"]
    assert model.config.layers_block_type == kinds
    repaired = {row["role"] for row in json.loads((run.path / "repair.json").read_text())["layers"]}
    assert "ssm_out" in repaired
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "validation"]
    assert rows[-1]["kd"] < rows[0]["kd"]
    page = (run.path / "report" / "report.html").read_text()
    assert "SSM heads" in page
    assert not run_until(config, "report", QUIET)
