"""distill.objectives: what is accepted, what is refused and how, and that settings survive the run's config.yaml."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest

from kdscale.config.distill.layer_objectives import AttentionConfig, HiddenStatesConfig
from kdscale.config.distill.objective import ModelPair, ObjectiveConfig
from kdscale.config.distill.objectives import TokenDivergenceConfig, log_columns
from kdscale.config.distill.targets import SOURCES, Needs, combined, placements
from kdscale.config.load import build_config, dump_config, load_config
from kdscale.config.root import Config
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
        ([{"name": "tokens"}], r"distill\.objectives\.0\.name: expected one of token_divergence, .*got 'tokens'"),
        ([{"top_k": 3}], r"objectives\.0: expected a mapping with the name of an objective \(token_divergence, "),
        ([{**TOKENS, "topk": 3}], r"objectives\.0\.topk: unknown key \(did you mean 'top_k'\?\)"),
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


HIDDEN, ATTENTION = {"name": "hidden_states"}, {"name": "attention"}


@pytest.mark.parametrize(
    ("distill", "message"),
    [
        ({"objectives": [{**HIDDEN, "layers": {}}]}, "layers: expected at least one pair"),
        ({"objectives": [{**HIDDEN, "layers": {-2: 0}}]}, r"layers\.-2\.\[key\]: .*greater than or equal to -1"),
        ({"objectives": [{**ATTENTION, "layers": {1: -1}}]}, "layers: expected layers from 0, got -1"),
        ({"objectives": [{**HIDDEN, "layers": {"one": 1}}]}, r"layers\.one\.\[key\]"),
        ({"objectives": [{**ATTENTION, "compare": []}]}, "compare: .*at least 1"),
        ({"objectives": [{**ATTENTION, "compare": ["maps"]}]}, "'query', 'key', 'value' or 'map'"),
        ({"objectives": [ATTENTION], "processes": 2, "sequence_parallel": 2}, "attention, which reads whole documents"),
        ({"objectives": [HIDDEN], "processes": 2, "tensor_parallel": 2}, "not go with the objective hidden_states"),
        (
            {"objectives": [HIDDEN], "teacher_placement": "served", "served": {"urls": ["http://host:1"]}},
            r"hidden states of layers \[0\]; use replicated or partitioned or offloaded",
        ),
    ],
)
def test_layers_that_cannot_be_matched_are_refused(distill: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**distill)


def test_layers_are_settled_when_the_models_are_known() -> None:
    pair = ModelPair(6, 4, 64, 48, widths=(64, 32, 48, 24), kept_layers=(0, 1, 4, 5))
    hidden, attention = HiddenStatesConfig(pairs=3).settled(pair, 9), AttentionConfig().settled(pair, 9)
    assert (hidden.layers, attention.layers, attention.relation_heads) == ({0: 0, 1: 3, 3: 5}, {3: 5}, 1)
    assert (hidden.needs.hidden_layers, hidden.student_layers.hidden) == ((0, 3, 5), (0, 1, 3))
    for entry, message in (
        (HiddenStatesConfig(layers={4: 0}), "layers of the student from -1 to 3(.|\n)*4"),
        (AttentionConfig(layers={0: 6}), "layers of the teacher from 0 to 5(.|\n)*6"),
        (AttentionConfig(relation_heads=3), "a divisor of 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            entry.settled(pair, 9)


def test_a_layer_map_survives_the_runs_config(tmp_path: Any) -> None:
    cfg = config(objectives=[{**HIDDEN, "layers": {-1: -1, 2: 5}}])
    (tmp_path / "config.yaml").write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == cfg


class WholeHeadConfig(ObjectiveConfig):
    implementation, terms = "none", ()
    name: Literal["whole_head"] = "whole_head"


class PerSequenceConfig(TokenDivergenceConfig):
    count: ClassVar[Literal["tokens", "sequences"]] = "sequences"


def test_ranks_that_share_a_model_need_objectives_that_can_do_it() -> None:
    assert config(processes=2, tensor_parallel=2).distill.data_parallel == 1
    with pytest.raises(ConfigError, match=r"tensor_parallel \(2\) does not go with the objective whole_head"):
        config(processes=2, tensor_parallel=2, objectives=[WholeHeadConfig()])
    with pytest.raises(ConfigError, match=r"sequence_parallel \(2\) does not go with token_divergence, which counts"):
        config(processes=2, sequence_parallel=2, objectives=[PerSequenceConfig()])


def test_objectives_on_the_top_k_share_a_temperature() -> None:
    assert combined([Needs(top_k=8, temperature=2.0), Needs(top_k=16, temperature=2.0), Needs(full=True)]) == Needs(
        top_k=16, temperature=2.0, full=True, hidden_layers=[], attention_layers=[]
    )
    with pytest.raises(ValueError, match=r"one temperature, got 1\.0 and 2\.0"):
        combined([Needs(top_k=8, temperature=2.0), Needs(top_k=8)])


def test_top_k_targets_of_one_temperature_do_not_do_for_another() -> None:
    stored = Needs(top_k=64, temperature=2.0)
    assert Needs(top_k=8, temperature=2.0).missing_from(stored) == ""
    schedule = TokenDivergenceConfig(temperature={"start": 2.0, "end": 1.0}).temperature
    assert Needs(top_k=8, temperature=schedule).missing_from(stored) == (
        "targets at temperature 2 → 1 (linear, 100% of the steps) (it has those at 2.0)"
    )
    assert Needs(top_k=8, temperature=schedule).missing_from(Needs(top_k=64, temperature=None)) == ""


def test_every_placement_chooses_one_source() -> None:
    assert len(set(placements())) == len(placements())
