"""What pairs of answers go with."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale.config.distill.on_policy import PreferencesConfig
from kdscale.config.load import build_config, may_change
from kdscale.errors import ConfigError

PAIRS = [{"path": "pairs.jsonl"}]
GIVEN = {"objectives": [{"name": "preference", "labels": "given"}]}


def build(preferences: dict[str, Any], **distill: Any) -> Any:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    return build_config({**tree, "distill": {**distill, "preferences": preferences}}, "test").distill


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"prompt_tokens": 200}, {}, r"prompt_tokens \+ max_new_tokens, 2 times, \(656\) must fit into seq_len \(512\)"),
    (GIVEN, {}, "labels: given needs pairs"),
    ({"pairs": PAIRS, "prompts": [{"path": "p.txt"}]}, {}, "pairs: have prompts of their own"),
    ({"positions": "entropy"}, {}, "answers are compared whole"),
    ({"pairs": PAIRS, "objectives": [{"name": "policy_gradient"}]}, {}, "not for given pairs"),
    ({"objectives": [{"name": "cross_entropy"}]}, {}, "would teach the worse answers too"),
    ({}, {"on_policy": {}}, "preferences: does not go with on_policy"),
    ({}, {"teachers": [{"name": "a"}]}, "preferences: does not go with several teachers"),
    ({}, {"sequence_parallel": 2, "processes": 2}, "preferences: does not go with sequence_parallel above 1"),
    ({}, {"teacher_placement": "served", "served": {"urls": ["http://h:1"]}}, "the probability of the text's own"),
    ({}, {"teacher_placement": "base", "lora": {}, "objectives": [{"name": "cross_entropy"}]}, "no margin over"),
]


@pytest.mark.parametrize(("preferences", "distill", "message"), REFUSED, ids=[row[2][:30] for row in REFUSED])
def test_what_does_not_go_together_is_refused(
    preferences: dict[str, Any], distill: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(preferences, **distill)


def test_pairs_with_labels_of_their_own_need_no_teacher() -> None:
    found = build({"pairs": PAIRS, **GIVEN}, objectives=[{"name": "cross_entropy"}])
    assert found.source.name == "text" and found.preferences.needs_reference
    assert build({"pairs": PAIRS}).needs.label


def test_the_objective_belongs_into_its_section() -> None:
    tree = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    for distill in ({"objectives": [{"name": "preference"}]}, {"on_policy": {"objectives": [{"name": "preference"}]}}):
        with pytest.raises(ConfigError, match="preference compares two answers: put it in"):
            build_config({**tree, "distill": distill}, "test")


def test_what_a_run_may_change() -> None:
    assert may_change("distill.preferences.validate_prompts") and not may_change("distill.preferences.pairs")
    own = build({"share": 0.25})
    assert "on_policy" not in own.decisive() and own.decisive()["preferences"]["share"] == 0.25
    assert "validate_prompts" not in own.decisive()["preferences"]


def test_in_words() -> None:
    written = PreferencesConfig().in_words
    assert written.startswith("50% of the sequences pairs of answers of the student, anew every 8 steps: −log σ(0.1·")
    assert "sequences pairs of answers from files: −log" in PreferencesConfig(pairs=PAIRS).in_words  # type: ignore[arg-type]
