"""A ready model as the student: of another family, with more padding in its head; what is made of it, and refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kdscale.config.load import load_config
from kdscale.errors import CheckpointError, ConfigError, KdscaleError
from kdscale.files import read_json, write_text
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.stages.registry import stages_until
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter
from tests.integration.prune.family_table import save_teacher

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def ready_student(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolLM 3 with 352 rows for the tokenizer's 320 tokens, as the teacher has; the last 32 are large."""
    folder = save_teacher("smollm3", tmp_path_factory.mktemp("ready"), vocab_size=352, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama_dir / name, folder / name)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][320:] = 5.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_student(config: Path, student: Path, more: str = "") -> Path:
    text = config.read_text().replace("prune: {ffn: 64, heads: 4}", f"student: {{path: {student}}}")
    write_text(config, text + more)
    return config


def test_it_learns_like_a_pruned_one_and_the_rows_of_no_token_count_for_nothing(
    tiny_config: Path, ready_student: Path
) -> None:
    quick = ["eval.efficiency=false", "eval.prompts=[]", "distill.tokens=1280"]
    config = load_config(with_student(tiny_config, ready_student), quick)
    assert run_until(config, "report", QUIET)
    run = RunFolder(Path(config.run_dir))
    assert not run.plan.exists() and not run.importance.exists()
    assert read_json(run.student / "config.json")["model_type"] == "smollm3"
    before, after = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (run.pruned, run.student)
    )
    assert before.shape == after.shape == (352, before.shape[1])
    assert before[320:].equal(after[320:]) and not before[:320].equal(after[:320])
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "validation"]
    assert rows[-1]["kd"] < rows[0]["kd"] < 6.0  # of 320 tokens; nearly all probability would be on the other 32
    evaluation = read_json(run.eval / "eval.json")
    assert list(evaluation["models"]) == ["teacher", "start", "distilled"]
    assert evaluation["models"]["start"]["quality"]["perplexity"] < 2000
    page = (run.report / "report.html").read_text(encoding="utf-8")
    assert "<th" in page and "Start" in page and "There is no plan yet" not in page
    assert "A ready model, trained further" in (run.student / "README.md").read_text()
    assert not run_until(config, "report", QUIET)
    with pytest.raises(ConfigError, match=r"(?s)no stage prune.*no student in the config"):
        stages_until("prune", config)


def other_tokens(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|end|>", "<|stop|>"))


@pytest.mark.parametrize(
    ("change", "message", "error"),
    [
        (
            other_tokens,
            r"student\.path: tokenizer of(.|\n)*the vocabulary of teacher\.path(.|\n)*distill\.teachers",
            CheckpointError,
        ),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing", CheckpointError),
        (shutil.rmtree, r"student\.path(.|\n)*no such folder", ConfigError),
    ],
)
def test_what_cannot_learn_is_refused_before_any_work(
    change: Callable[[Path], Any], message: str, error: type[KdscaleError], tiny_config: Path, ready_student: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    shutil.copytree(ready_student, tmp_path / "student")
    change(tmp_path / "student")
    config = load_config(with_student(tiny_config, tmp_path / "student"))
    with pytest.raises(error, match=message):
        run_until(config, "distill", QUIET)
    assert not (Path(config.run_dir) / "data").exists()
