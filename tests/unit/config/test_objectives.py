"""distill.objectives: what is accepted, what is refused and how, and that settings survive the run's config.yaml."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.load import build_config, dump_config, load_config
from kdscale.config.objectives import TokenDivergenceConfig, log_columns
from kdscale.config.root import Config
from kdscale.config.targets import SOURCES, Needs, placements
from kdscale.errors import ConfigError

TOKENS = {"name": "token_divergence"}


def config(**distill: Any) -> Config:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "distill": distill}
    return build_config(tree, "test")


def test_the_default_is_one_token_divergence() -> None:
    assert config().distill.objectives == (TokenDivergenceConfig(),)
    assert config().distill.needs == Needs(top_k=64, hidden_layers=[], attention_layers=[])
    columns = [column.name for column in log_columns(config().distill.objectives)]
    assert columns == ["loss", "kd", "ce", "teacher_mass", "tail_mass", "top1_agree"]


def test_settings_of_an_entry_survive_the_runs_config(tmp_path: Any) -> None:
    cfg = config(objectives=[{**TOKENS, "top_k": "1k", "weight": 0.5, "divergence": "jsd"}])
    (tmp_path / "config.yaml").write_text(dump_config(cfg), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == cfg
    assert again.distill.needs.top_k == 1000
    assert again.distill.decisive()["objectives"][0]["divergence"] == "jsd"


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ([{"name": "tokens"}], r"distill\.objectives\.0: name: expected one of token_divergence, got 'tokens'"),
        ([{"top_k": 3}], r"objectives\.0: expected a mapping with the name of an objective \(token_divergence\)"),
        ([{**TOKENS, "topk": 3}], r"objectives\.0: topk: unknown key \(did you mean 'top_k'\?\)"),
        ([{**TOKENS, "temperature": -1.0}], r"objectives\.0\.temperature: .*greater than 0"),
        ([{**TOKENS, "weight": 0.0}], r"objectives\.0\.weight"),
        ([], "at least one"),
        ([TOKENS, TOKENS], "each may appear once"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(objectives: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(objectives=objectives)


def test_a_source_that_lacks_something_is_refused_with_those_that_have_it() -> None:
    served = {"teacher_placement": "served", "served": {"urls": ["http://host:1"]}}
    assert config(**served).distill.source is SOURCES["served"]
    with pytest.raises(ConfigError, match="whole vocabulary; use replicated or partitioned or offloaded"):
        config(objectives=[{**TOKENS, "targets": "full"}], **served)
    with pytest.raises(ConfigError, match=r"the top 5000 tokens \(it gives 4096\)"):
        config(objectives=[{**TOKENS, "top_k": 5000}], **served)
    with pytest.raises(ConfigError, match=r"teacher_placement: expected one of replicated, partitioned"):
        config(teacher_placement="nowhere")


def test_needs_of_layers_are_compared_too() -> None:
    wanted = Needs(hidden_layers=[1, 4], attention_layers=[2])
    assert wanted.missing_from(Needs(hidden_layers=range(9))) == "attention of layers [2]"
    assert wanted.missing_from(Needs(hidden_layers=[4])) == "hidden states of layers [1], attention of layers [2]"
    assert wanted.in_words() == "the teacher's hidden states, attention"


def test_every_placement_chooses_one_source() -> None:
    assert len(set(placements())) == len(placements())
