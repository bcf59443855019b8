"""A student that learns from pairs of answers, in whole distillations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kdscale.config.root import Config
from kdscale.distill.load_models import Folders
from kdscale.distill.replay import replay
from kdscale.errors import DataError, Interrupted
from kdscale.report.training_facts import curves
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter

WRITTEN: dict[str, Any] = {
    "preferences": {
        "share": 0.5, "every": 3, "prompt_tokens": 8, "max_new_tokens": 12, "micro_batch": 4, "validate_prompts": 4,
        "objectives": [{"name": "preference", "beta": 0.5}],
    },
    "tokens": 6 * 4 * 48, "validate_every": 3, "checkpoint_every": 2,
}  # fmt: skip
STUDENT = Path("student") / "model.safetensors"


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "on-policy" / "rank-0.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda record: (record["sequence"], record["slot"]))


@pytest.fixture(scope="module")
def whole(distil: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pairs")
    return folder, distil(folder, **WRITTEN)


def test_the_student_writes_two_answers_to_a_prompt_and_the_teacher_ranks_them(
    whole: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, rows = whole
    written = records(folder)
    assert len(written) == 6 * 2 * 2  # half of 4 sequences, each with a prompt and two answers
    for first, second in zip(written[0::2], written[1::2], strict=True):
        assert (first["sequence"], first["prompt"]) == (second["sequence"], second["prompt"])
    assert sum(a["ids"] != b["ids"] for a, b in zip(written[0::2], written[1::2], strict=True)) > 6
    train = [row for row in rows if row["kind"] == "train"]
    assert train[0]["preferences_loss"] == pytest.approx(math.log(2), abs=1e-4)  # the student is its own reference
    assert train[-1]["preferences_loss"] != pytest.approx(math.log(2), abs=1e-4)
    for row in train:
        own = sum(record["answer_tokens"] for record in written if record["step"] == row["step"])
        both = (0.8 * row["kd"] + 0.2 * row["ce"]) * (row["labels"] - own) + row["preferences_loss"] * own
        assert row["loss"] == pytest.approx(both / row["labels"], rel=1e-6)
    validations = [row for row in rows if row["kind"] == "validation"]
    assert all(0.0 <= row["preferences_ranking_accuracy"] <= 1.0 for row in validations)
    titles = {term["title"] for term in curves(rows)["terms"]}
    assert {"ranked as labelled on pairs", "loss on pairs"} <= titles
    assert "pairs of answers of the student" in (folder / "student" / "README.md").read_text()


def test_a_killed_run_goes_on_to_the_same_bytes_with_the_same_answers(
    distil: Callable[..., Any], whole: Any, tmp_path: Path, dies_at_step: Callable[..., Any]
) -> None:
    with dies_at_step(4, Interrupted):
        distil(tmp_path, **WRITTEN)
    rows = distil(tmp_path, **WRITTEN)
    assert (tmp_path / STUDENT).read_bytes() == (whole[0] / STUDENT).read_bytes()
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole[1]]
    assert records(tmp_path) == records(whole[0])


def test_a_step_is_replayed(
    whole: Any, make_config: Callable[..., Config], tiny_llama_dir: Path, student_dir: Path, data_dir: Path
) -> None:
    folder, rows = whole
    found = replay(
        make_config(**WRITTEN), Folders(tiny_llama_dir, student_dir, data_dir, folder), 6,
        max_steps=2, nearest=False, reporter=Reporter(quiet=True),
    )  # fmt: skip
    assert found["same_bits"] and found["preferences_ranking_margin"] == rows[-2]["preferences_ranking_margin"]


def pairs_file(folder: Path, texts: list[str]) -> Path:
    """Answers of text over answers that say nothing but `the`."""
    lines = [text.split()[:9] for text in texts if len(text.split()) >= 9]
    pairs = [
        {"prompt": " ".join(words[:3]), "chosen": " ".join(words[3:]), "rejected": "the the the the the the"}
        for words in lines
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ({"labels": "given", "beta": 0.5}, {"lora": {"rank": 8, "alpha": 32}, "zero_stage": 1}),
        ({"labels": "given", "reference": "none", "length_normalised": True, "beta": 2.0}, {"zero_stage": 3}),
    ],
)
def test_given_pairs_are_learnt_and_measured_on_others(
    distil: Callable[..., Any], tmp_path: Path, tiny_texts: list[str], objective: dict[str, Any], more: dict[str, Any]
) -> None:
    file = pairs_file(tmp_path, tiny_texts)
    preferences = {
        "pairs": [{"path": str(file)}], "share": 1.0, "prompt_tokens": 12, "max_new_tokens": 36,
        "objectives": [{"name": "preference", **objective}], "validate_prompts": 64,
    }  # fmt: skip
    settings = {"preferences": preferences, "seq_len": 96, "tokens": 8 * 4 * 96, "micro_batch": 4, **more}
    rows = distil(tmp_path / "run", **settings, objectives=[{"name": "cross_entropy"}])
    first, *_, last = [row for row in rows if row["kind"] == "validation"]
    assert last["preferences_ranking_accuracy"] == 1.0 and last["preferences_ranking_margin"] > 0.0
    assert last["preferences_loss"] < first["preferences_loss"]
    assert not (tmp_path / "run" / "on-policy").exists()
    if "lora" in more:
        assert first["preferences_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")


def test_pairs_that_cannot_be_used_are_named(distil: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    settings = {"pairs": [{"path": str(file)}], "prompt_tokens": 4, "max_new_tokens": 4}
    own = {"preferences": {**settings, "objectives": [{"name": "preference", "labels": "given"}]}}
    for line, message in (
        ({"prompt": "a", "chosen": "b"}, "pairs.jsonl line 1, field 'rejected'"),
        ({"prompt": "a", "chosen": "b " * 40, "rejected": "c"}, "at least one pair of at most 4 tokens of prompt"),
    ):
        file.write_text(json.dumps(line) + "\n")
        with pytest.raises(DataError, match=message):
            distil(tmp_path / "run", **own)


@pytest.mark.long
def test_two_ranks_that_share_the_weights_learn_from_the_pairs_of_one(
    whole: Any, make_config: Callable[..., Config], tiny_llama_dir: Path, student_dir: Path, data_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "shared"
    job = {
        "teacher_dir": str(tiny_llama_dir), "student_dir": str(student_dir), "data_dir": str(data_dir),
        "run_dir": str(folder), "ranks": 2, "step": None, "texts": None,
        "config": make_config(**WRITTEN, processes=2, zero_stage=3).resolved(),
    }  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    command = [sys.executable, str(Path(__file__).with_name("on_policy_worker.py")), str(tmp_path / "jobs.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [row for row in read_metrics(folder / "logs" / "metrics.jsonl") if row["kind"] == "train"]
    alone = [row for row in whole[1] if row["kind"] == "train"]
    for name in ("loss", "preferences_loss", "preferences_label_confidence"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone], abs=1e-4)
