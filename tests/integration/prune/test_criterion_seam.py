"""A criterion is one row and one function: this one is added from outside, and goes through importance and plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from kdscale.config import criteria
from kdscale.config.criteria import CRITERIA, Criterion
from kdscale.config.load import load_config
from kdscale.errors import ConfigError
from kdscale.pipeline.runner import run_until
from kdscale.prune.importance.layer_context import Collector, LayerContext
from kdscale.report.pruning_facts import importance
from kdscale.runs.importance_scores import load_scores
from kdscale.runtime.progress import Reporter


def firing_counts(layer: LayerContext) -> Collector:
    """[F]: on how many tokens the unit is positive."""

    def positive(x_BSF: Tensor) -> Tensor:
        return (x_BSF > 0).sum((0, 1))

    return layer.sum_over_batches("ffn", "positive", positive)


def test_a_criterion_added_from_outside_goes_from_importance_to_the_plan(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["prune.ffn=64", "prune.heads=null", "prune.ffn_method=firing"]
    with pytest.raises(ConfigError, match="expected one of output_energy"):
        load_config(tiny_config, settings)
    row = Criterion(
        axis="ffn", method="firing", unit="norm", collect=f"{__name__}:firing_counts", title="tokens", source="a test"
    )
    monkeypatch.setattr(criteria, "CRITERIA", (*CRITERIA, row))
    config = load_config(tiny_config, settings)
    run_until(config, "plan", Reporter(quiet=True))
    run = Path(config.run_dir)
    scores, plan = load_scores(run / "importance"), json.loads((run / "plan.json").read_text())
    assert scores.units["ffn.firing"] == "norm"
    assert set(scores) == {"ffn.output_energy", "ffn.activation", "ffn.firing"}
    assert plan["methods"]["ffn"] == "firing"
    counts_LF = scores["ffn.firing"]
    kept = [sorted(np.argsort(-counts_F, kind="stable")[:64].tolist()) for counts_F in counts_LF]
    assert plan["kept"]["ffn"] == kept
    shares = [
        (counts_F[units] ** 2).sum() / (counts_F**2).sum() for counts_F, units in zip(counts_LF, kept, strict=True)
    ]
    assert plan["retained"]["ffn"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert importance(run / "importance")["scores"]["ffn.firing"] == (counts_LF.astype("float64") ** 2).tolist()
    assert "| ffn | `firing` | norm | tokens | a test |" in criteria.criteria_table()
