"""A teacher with another tokenizer in whole distillations: what it teaches, what is said of it, when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import ConfigError
from kdscale.files import read_json
from kdscale.runtime.progress import Reporter
from tests.unit.teacher.vocabulary.conftest import sentence_piece

SHORT = {"tokens": 4 * 4 * 48, "objectives": [{"name": "token_divergence", "top_k": 16}]}


@pytest.fixture(scope="module")
def far_teacher(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that begins every text with a token of its own, and cuts it otherwise than the student."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("far")
    tokenizer = sentence_piece(120, tiny_texts)
    tokenizer.add_bos_token = True
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer) + 5, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teachers(folder: Path, **entry: Any) -> list[dict[str, Any]]:
    return [{"name": "far", "path": str(folder), **entry}]


NO_LIMIT = {"alignment": {"min_same_tokens": 0.0, "min_same_probability": 0.0}}


def test_it_teaches_and_how_much_is_understood_is_said(
    distil: Callable[..., Any], far_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda self, text: said.append(text))
    rows = distil(tmp_path / "run", teachers=teachers(far_teacher, **NO_LIMIT), **SHORT)
    measured = [row for row in rows if row["kind"] == "validation"]
    assert measured[-1]["kd"] < measured[0]["kd"] * 0.95
    assert any(
        text.startswith("teacher far, with another tokenizer: ") and "one token in both" in text for text in said
    )
    found = read_json(tmp_path / "run" / "logs" / "alignment.json")["far"]
    assert found["labels"] >= found["aligned"] >= found["same"] > 0 and found["in_words"] in said[-1] + " ".join(said)
    assert 0 < found["exact"] <= found["mass"]

    elsewhere = teachers(far_teacher, teacher_placement="partitioned", **NO_LIMIT)
    parted = distil(tmp_path / "parted", teachers=elsewhere, **SHORT)
    losses = [[row["loss"] for row in one] for one in (rows, parted)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_tokens_without_a_match_teach_by_their_sorted_probabilities(
    distil: Callable[..., Any], far_teacher: Path, tmp_path: Path
) -> None:
    tail = {"alignment": {**NO_LIMIT["alignment"], "other_pieces": "tail"}}
    objectives = [*SHORT["objectives"], {"name": "uld", "top_k": 16, "weight": 100.0, "unaligned": "compare"}]
    rows = distil(tmp_path / "run", teachers=teachers(far_teacher, **tail), **{**SHORT, "objectives": objectives})
    measured = [row for row in rows if row["kind"] == "validation"]
    assert measured[-1]["uld"] < measured[0]["uld"]
    assert all(0 < row["teacher_unmatched"] < 1 for row in measured)
    assert all(row["student_unmatched"] == 0 for row in measured), "this student has no token that the teacher lacks"
    with pytest.raises(ConfigError, match=r"(?s)only one of two tokenizers has.*one with the student's tokens"):
        distil(tmp_path / "same", teachers=[{"name": "own", **tail}], **{**SHORT, "objectives": objectives})


def test_too_little_in_common_is_refused_before_the_first_step(
    distil: Callable[..., Any], far_teacher: Path, tmp_path: Path
) -> None:
    few = {"alignment": {"min_same_tokens": 0.99, "min_same_probability": 0.0}}
    with pytest.raises(ConfigError, match=r"(?s)distill.teachers \(far\): alignment.min_same_tokens.*at least 99%"):
        distil(tmp_path / "tokens", teachers=teachers(far_teacher, **few), **SHORT)
    little = {"alignment": {"min_same_tokens": 0.0, "min_same_probability": 1.0}}
    with pytest.raises(ConfigError, match=r"(?s)alignment.min_same_probability.*of held-out text"):
        distil(tmp_path / "mass", teachers=teachers(far_teacher, **little), **SHORT)
    assert not (tmp_path / "tokens" / "student").exists() and not (tmp_path / "tokens" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objectives": [{"name": "token_divergence", "targets": "full"}]}, "targets: full"),
        ({"objectives": [{"name": "token_divergence", "tail": "renormalised"}]}, "tail: renormalised"),
        ({"sequence_parallel": 2, "processes": 2}, "sequence_parallel above 1"),
    ],
)
def test_what_it_cannot_give_is_refused(
    make_config: Callable[..., Any], far_teacher: Path, student_dir: Path, settings: dict[str, Any], message: str
) -> None:
    from kdscale.teacher.vocabulary.across import check_across

    config = make_config(teachers=teachers(far_teacher), **settings)
    with pytest.raises(ConfigError, match=rf"(?s)teachers \(far\): its tokens are not the student's.*{message}"):
        check_across(config.distill, "far")
