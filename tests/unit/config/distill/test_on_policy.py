"""Which sequences the student writes, and what does not go with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdscale.config.distill.on_policy import FREE_ON_POLICY, OnPolicyConfig
from kdscale.config.distill.schedules import Schedule
from kdscale.config.distill.targets import SOURCES
from kdscale.config.load import build_config, may_change
from kdscale.errors import ConfigError

VLLM = {"writer": "vllm", "vllm": {"endpoint": {"base_url": "http://localhost:1/v1", "model": "m"}}}


def build(own: dict[str, Any], **distill: Any) -> Any:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    return build_config({**tree, "distill": {**distill, "on_policy": own}}, "test").distill


@given(st.floats(0.01, 1.0), st.integers(1, 40), st.integers(2, 400))
def test_the_share_of_the_sequences_is_right_on_the_whole(share: float, batch: int, steps: int) -> None:
    own = OnPolicyConfig(share=share, start=0.5)
    first = own.first_step(steps)
    counts = [own.sequences_at(step, steps, batch) for step in range(steps)]
    assert not any(counts[:first]) and all(0 <= count <= batch for count in counts)
    assert all(abs(count - share * batch) < 1 for count in counts[first:])
    assert sum(counts) == pytest.approx(share * batch * (steps - first), abs=4)  # a sum of golden steps stays close


def test_a_schedule_of_the_share_begins_where_the_phase_does() -> None:
    own = OnPolicyConfig(share=Schedule(start=0.0, end=1.0), start=0.5)
    counts = [own.sequences_at(step, 20, 100) for step in range(20)]
    assert counts[:10] == [0] * 10 and counts[-1] == 100
    assert counts == sorted(counts) and 40 <= counts[14] <= 48


def test_rounds_begin_at_the_phases_first_step() -> None:
    own = OnPolicyConfig(start=0.25, every=3)
    assert [own.round_of(step, 8) for step in range(2, 8)] == [2, 2, 2, 5, 5, 5]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt_tokens": 500}, {}, r"prompt_tokens \+ max_new_tokens \(628\) must fit into seq_len \(512\)"),
    ({}, {"shorter_first": [{"seq_len": 256, "until": 0.5}]}, "does not go with shorter_first"),
    ({}, {"tensor_parallel": 2, "processes": 2}, "no rank has the student whole"),
    ({}, {"sequence_parallel": 2, "processes": 2}, "does not go with sequence_parallel"),
    ({}, {"objectives": [{"name": "hidden_states"}]}, "does not go with the objective hidden_states"),
    ({}, {"objectives": [{"name": "policy_gradient"}]}, "put it in on_policy"),
    ({"objectives": [{"name": "cross_entropy"}]}, {}, "would teach the student its own tokens"),
    ({"objectives": [{"name": "token_divergence", "ce_weight": 0.1}]}, {}, "would teach the student its own tokens"),
    ({"objectives": [{"name": "attention"}]}, {}, "attention is for the run's text alone"),
    ({"writer": "vllm"}, {}, r"needs vllm\.endpoint\.base_url and vllm\.endpoint\.model"),
    ({**VLLM, "positions": "entropy"}, {}, "positions: entropy needs writer: local"),
    ({}, {"teacher_placement": "cached"}, "knows the run's text alone"),
    (
        {"prompts": [{"path": "p.txt"}], "objectives": [{"name": "token_divergence"}]},
        {"teachers": [{"name": "a", "tags": ["x"]}, {"name": "b"}]}, "prompts from files and teachers with tags",
    ),
    ({}, {"teachers": [{"name": "a"}, {"name": "b", "weight": 2}]}, "is not defined on a mixture of teachers"),
    (
        {"objectives": [{"name": "policy_gradient"}]},
        {"teacher_placement": "served", "served": {"urls": ["http://h:1"]}}, "probability of the text's own next token",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("own", "distill", "message"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_does_not_go_together_is_refused(own: dict[str, Any], distill: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(own, **distill)


def test_every_source_that_scores_new_text_is_accepted() -> None:
    where = {
        "served": {"urls": ["http://h:1"]}, "endpoint": {"base_url": "https://h/v1", "model": "m"},
        "objectives": [{"name": "token_divergence", "ce_weight": 0.5}],
    }  # fmt: skip
    for source in SOURCES.values():
        for placement in source.placements:
            if source.any_text:
                own = {"objectives": [{"name": "token_divergence", "divergence": "reverse_kl"}]}
                more = {**where, **({"lora": {}} if placement == "base" else {})}
                assert build(own, teacher_placement=placement, **more).on_policy is not None


def test_a_teacher_that_gives_no_whole_distribution_is_told_apart() -> None:
    where = {"teacher_placement": "served", "served": {"urls": ["http://h:1"]}}
    with pytest.raises(ConfigError, match=r"on_policy\.objectives: with teacher_placement: served .* or targets: topk"):
        build({}, **where)


def test_what_decides_about_the_student_is_all_but_how_it_is_written() -> None:
    decisive = build({}).decisive()["on_policy"]
    assert set(decisive) == set(OnPolicyConfig.model_fields) - FREE_ON_POLICY
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    assert "on_policy" not in build_config(tree, "test").distill.decisive()  # runs of older versions go on


def test_a_run_may_go_on_with_another_way_of_writing_but_not_with_other_texts() -> None:
    assert may_change("distill.on_policy.micro_batch") and may_change("distill.on_policy.vllm.concurrency")
    assert not any(may_change(f"distill.on_policy{field}") for field in ("", ".share", ".writer", ".objectives"))


def test_trainings_inside_the_run_have_no_such_phase() -> None:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "correct": {}}
    config = build_config({**tree, "distill": {"on_policy": {}}}, "test")
    correction = config.correction()
    assert correction is not None and correction.distill.on_policy is None
