"""Every objective with every source of targets and every two settings: accepted, or refused by one clear message."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from kdscale.config.distill.objectives import OBJECTIVES
from kdscale.config.distill.targets import placements
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError

FADED = {"start": 1.0, "end": 0.5}
# what else an objective may be asked for, by its name; every row of OBJECTIVES is there as it is
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in OBJECTIVES},
    "with text": {"name": "token_divergence", "ce_weight": 0.5},
    "reverse_kl": {"name": "token_divergence", "divergence": "reverse_kl"},
    "where the teacher is sure": {"name": "token_divergence", "text_below_entropy": 0.5},
    "renormalised": {"name": "token_divergence", "tail": "renormalised", "temperature": 2.0},
    "sampled": {"name": "token_divergence", "targets": "sampled"},
    "full": {"name": "token_divergence", "targets": "full"},
    "temperature": {"name": "token_divergence", "temperature": {"start": 2.0, "end": 1.0}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "tensor_parallel": {"tensor_parallel": 2, "processes": 2},
    "sequence_parallel": {"sequence_parallel": 2, "processes": 2},
    "zero_stage": {"zero_stage": 3},
    "compile": {"compile": "layers"},
    "teacher_overlap": {"teacher_overlap": True},
    "teacher_dtype": {"teacher_dtype": "float8"},
    "shorter_first": {"shorter_first": [{"seq_len": 256, "until": 0.5}]},
    "gradient_checkpointing": {"gradient_checkpointing": "selective"},
    "fake_quantize": {"fake_quantize": {"bits": 4, "group": 32}},
    "lora": {"lora": {}},
    "on_policy": {"on_policy": {}},
    "weight": {},  # a schedule of the objective's
    "correct": {},
    "teachers": {},  # two, both of every text
    "targets": {},  # a store of the top K in place of one of hidden states
}


def build(objective: dict[str, Any], placement: str, settings: tuple[str, ...]) -> Config:
    source = {
        "teacher_placement": placement,
        "served": {"urls": ["http://host:1"]},
        "endpoint": {"base_url": "https://host/v1", "model": "m"},
    }
    entry = {**objective, "weight": FADED} if "weight" in settings else objective
    kind = OBJECTIVES[objective["name"]]
    section = "on_policy" if kind.only_own_text else "preferences" if kind.only_pairs else None
    distill: dict[str, Any] = {section: {"objectives": [entry]}} if section else {"objectives": [entry]}
    if "teachers" in settings:
        distill["teachers"] = [{"name": "own"}, {"name": "other", **source}]
    else:
        distill |= source
    distill |= {"lora": {}} if placement == "base" else {}
    for name in settings:
        distill |= {} if section == name else SETTINGS[name]
    codec = {"name": "topk"} if "targets" in settings else {"name": "hidden"}
    tree: dict[str, Any] = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}
    tree |= {"correct": {}} if "correct" in settings else {}
    tree |= {"targets": {"codec": codec}} if placement == "cached" else {}
    answers = {"teacher": "endpoint", "endpoint": source["endpoint"], "prompts": [{"path": "p"}]}
    tree |= {"responses": {**answers, "sampling": {"top_logprobs": 20}}} if placement == "responses" else {}
    return build_config({**tree, "distill": distill}, "test")


def every_choice() -> list[tuple[str, tuple[str, ...]]]:
    chosen = [(), *((name,) for name in SETTINGS), *combinations(SETTINGS, 2)]
    return [(placement, settings) for placement in placements() for settings in chosen]


def check_accepted(cfg: Config) -> None:
    """What the parts of a run rely on without asking again."""
    distill = cfg.distill
    for one in distill.by_teacher().values():
        assert not distill.needs.missing_from(one.source.gives)
        assert distill.tensor_parallel == 1 or one.source.same_on_all_ranks
        assert not (one.source.is_student and distill.zero_stage == 3)
        assert one.teacher_placement != "base" or distill.lora is not None
    assert distill.on_policy is None or all(one.source.any_text for one in distill.by_teacher().values())
    for entry in distill.all_objectives:
        assert distill.tensor_parallel == 1 or entry.reads_head_shards
        assert distill.sequence_parallel == 1 or not entry.needs_whole_sequences
    if any(one.source.name == "cached" for one in distill.by_teacher().values()):
        assert cfg.targets is not None and not distill.needs.missing_from(cfg.targets.codec.gives)
    correction = cfg.correction()
    assert correction is None or correction.distill.needs.nothing


def check_refused(message: str, objective: dict[str, Any], settings: tuple[str, ...]) -> None:
    """One problem, that names a setting of this combination."""
    assert message.count("\n") <= 3 and len(message) < 500, message
    assert not any(word in message for word in ("Traceback", "pydantic", "Value error", "Config(")), message
    assert any(word in message for word in (*settings, "teacher_placement", objective["name"])), message


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_combination_is_accepted_or_refused_with_what_is_wrong(variant: str) -> None:
    accepted: Counter[str] = Counter()
    for placement, settings in every_choice():
        try:
            cfg = build(VARIANTS[variant], placement, settings)
        except ConfigError as error:
            check_refused(str(error), VARIANTS[variant], settings)
        else:
            check_accepted(cfg)
            accepted[placement] += 1
    if OBJECTIVES[VARIANTS[variant]["name"]]().needs.unmatched:  # only of one teacher with another tokenizer, by tags
        assert not accepted
        return
    assert accepted["replicated"] > len(SETTINGS)  # each goes with the teacher in the ranks, alone and with others


def test_every_source_goes_with_some_objective() -> None:
    for placement in placements():
        objective = {**VARIANTS["with text"], "top_k": 16}  # as many as each of them gives
        assert build(objective, placement, ()).distill.teacher_placement == placement
