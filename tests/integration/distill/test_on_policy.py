"""A student that learns from what it writes itself, in whole distillations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.root import Config
from kdscale.distill.load_models import Folders
from kdscale.distill.replay import replay
from kdscale.errors import RunFolderError
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter

OWN: dict[str, Any] = {
    "share": 0.5, "start": 0.25, "every": 3, "prompt_tokens": 8, "max_new_tokens": 12, "micro_batch": 3,
    "validate_prompts": 5,
}  # fmt: skip
STUDENT = Path("student") / "model.safetensors"


def records(run: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted((run / "on-policy").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda record: (record["sequence"], record["slot"]))


@pytest.fixture(scope="module")
def whole(distil: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of 8 steps of 4 sequences, the last 6 steps half written by the student: (its folder, its log)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, distil(folder, on_policy=OWN)


def test_steps_of_the_phase_learn_from_both_and_the_ones_before_it_from_the_text(
    whole: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, rows = whole
    written = records(folder)
    assert {record["weights_of_step"] for record in written} == {2, 5}
    assert all(record["weights_of_step"] == (2 if record["step"] <= 5 else 5) for record in written)
    # 6 steps, half of 4 sequences, each with two prompts
    assert len(written) == 6 * 2 * 2 and all(record["sequence"] // 4 == record["step"] - 1 for record in written)
    assert all(record["prompt_tokens"] <= 8 and record["answer_tokens"] <= 12 for record in written)
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train if "on_policy_kd" in row] == [3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in train if row.get("seconds_generation")] == [3, 6]
    for row in train[2:]:
        own = sum(record["answer_tokens"] for record in written if record["step"] == row["step"])
        text = row["labels"] - own
        both = ((0.8 * row["kd"] + 0.2 * row["ce"]) * text + row["on_policy_kd"] * own) / row["labels"]
        assert row["loss"] == pytest.approx(both, rel=1e-6)
    validations = [row for row in rows if row["kind"] == "validation"]
    assert all(row["on_policy_kd"] > 0 and "on_policy_perplexity" in row for row in validations)
    card = (folder / "student" / "README.md").read_text()
    assert "from 25% of the steps on, 50% of the sequences written by the student" in card


@pytest.fixture(scope="module")
def forks(
    make_config: Callable[..., Config], tiny_llama_dir: Path, student_dir: Path, data_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A folder with runs that were killed, `in-a-round` and `while-it-writes`, and one of two ranks, `shared`."""
    folder = tmp_path_factory.mktemp("forks")
    same = {"teacher_dir": str(tiny_llama_dir), "student_dir": str(student_dir), "data_dir": str(data_dir)}
    jobs = [
        {**same, "run_dir": str(folder / name), "ranks": ranks, "step": step, "texts": texts,
         "config": make_config(on_policy=OWN, **more).resolved()}
        for name, ranks, step, texts, more in (
            ("in-a-round", 1, 4, None, {}),
            ("while-it-writes", 1, None, 14, {}),
            ("shared", 2, None, None, {"processes": 2, "zero_stage": 3}),
        )
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("on_policy_worker.py")), str(folder / "jobs.json")]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("name", "written"), [("in-a-round", 12), ("while-it-writes", 14)])
def test_a_killed_run_goes_on_to_the_same_bytes_and_writes_nothing_twice(
    forks: Path, whole: Any, distil: Any, tmp_path: Path, name: str, written: int
) -> None:
    shutil.copytree(forks / name, tmp_path, dirs_exist_ok=True)
    assert len(records(tmp_path)) == written
    rows = distil(tmp_path, on_policy=OWN)
    assert (tmp_path / STUDENT).read_bytes() == (whole[0] / STUDENT).read_bytes()
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole[1]]
    assert records(tmp_path) == records(whole[0])


def test_a_round_that_is_gone_is_not_made_up(forks: Path, distil: Any, tmp_path: Path) -> None:
    shutil.copytree(forks / "in-a-round", tmp_path, dirs_exist_ok=True)
    (tmp_path / "on-policy" / "rank-0.jsonl").unlink()
    with pytest.raises(RunFolderError, match="lacks what the student wrote after step 2"):
        distil(tmp_path, on_policy=OWN)


def test_a_step_is_replayed_with_what_was_written(
    whole: Any, make_config: Any, tiny_llama_dir: Path, student_dir: Path, data_dir: Path
) -> None:
    folder, rows = whole
    before = (folder / "on-policy" / "rank-0.jsonl").read_bytes()
    found = replay(
        make_config(on_policy=OWN), Folders(tiny_llama_dir, student_dir, data_dir, folder), 8,
        max_steps=2, nearest=False, reporter=Reporter(quiet=True),
    )  # fmt: skip
    assert found["same_bits"] and found["on_policy_kd"] == rows[-2]["on_policy_kd"]
    assert (folder / "on-policy" / "rank-0.jsonl").read_bytes() == before


def test_two_ranks_that_share_the_weights_write_what_one_does(forks: Path, whole: Any) -> None:
    """ZeRO 3: the weights are gathered for the writing. Each rank draws by the sequence, not by its own number."""
    folder = forks / "shared"
    assert len(list((folder / "on-policy").glob("rank-*.jsonl"))) == 2
    mine, alone = records(folder), records(whole[0])
    assert [(r["key"], r["ids"]) for r in mine] == [(r["key"], r["ids"]) for r in alone]
    for name in ("logprobs", "mean_entropy"):
        assert all(a[name] == pytest.approx(b[name], abs=1e-3) for a, b in zip(mine, alone, strict=True))
    rows = [row["loss"] for row in read_metrics(folder / "logs" / "metrics.jsonl")]
    assert rows == pytest.approx([row["loss"] for row in whole[1]], abs=1e-4)
