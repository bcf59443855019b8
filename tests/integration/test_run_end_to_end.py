"""A whole run on a tiny model: results, idempotence, and the same bytes however often it is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdscale.runs.metrics_log import read_metrics

Cli = Callable[..., Any]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_from_teacher_to_report(kdscale: Cli, tiny_config: Path) -> None:
    run = tiny_config.parent / "run"
    outcome = kdscale("run", tiny_config)
    assert outcome.code == 0, outcome.err
    for name in ("config.yaml", "plan.json", "pruned", "student", "report/report.html", "report/report.json"):
        assert (run / name).exists()
    assert str(run / "report" / "report.html") in outcome.out

    models = json.loads((run / "eval" / "eval.json").read_text())["models"]
    figures = {name: measured["quality"] for name, measured in models.items()}
    assert figures["distilled"]["kl_to_teacher"] < figures["pruned"]["kl_to_teacher"]
    reported = json.loads((run / "report" / "report.json").read_text())
    assert reported["evaluation"]["models"]["distilled"]["quality"] == figures["distilled"]

    student, info = AutoModelForCausalLM.from_pretrained(run / "student", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert student.config.intermediate_size == 64
    assert student.config.head_dim == 16
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    with torch.no_grad():
        out = student.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 2

    before = digests(run / "student")
    again = kdscale("run", tiny_config)
    assert again.code == 0
    assert "nothing to do" in again.err
    assert digests(run / "student") == before
    status = kdscale("status", run)
    assert status.out.count("done") == 7

    kept = digests(run)
    replayed = kdscale("replay", run, "--step", 7)
    assert replayed.code == 0, replayed.err
    assert "the same bits" in replayed.out and "not the same" not in replayed.out
    assert len(json.loads((run / "replay" / "step-7.json").read_text())["sequences"]) == 4
    assert {name: digest for name, digest in digests(run).items() if not name.startswith("replay/")} == kept

    packaged = kdscale("package", tiny_config, "--forms", "bf16", "--license", "mit")
    assert packaged.code == 0 and "kdscale publish" in packaged.out, packaged.err
    card = (run / "package" / "README.md").read_text()
    assert "license: mit" in card and f"value: {float(format(figures['distilled']['perplexity'], '.6g'))}" in card
    assert (run / "package" / "report.html").read_bytes() == (run / "report" / "report.html").read_bytes()
    assert kdscale("publish", run / "package", "--to", "org/tiny", "--dry-run").code == 0
    assert kdscale("package", tiny_config).code == 2  # it is there already

    (run / "student" / "model.safetensors").write_bytes(b"")
    assert kdscale("package", tiny_config, "--out", run / "other").code == 5  # the student was changed
    assert kdscale("run", tiny_config).code == 0
    assert digests(run / "student") == before


def _progress_marks(run: Path) -> int:
    """Grows with everything the run finishes: stage events and training steps."""
    events = run / "events.jsonl"
    rows = len(events.read_text().splitlines()) if events.exists() else 0
    return rows + sum(1 for _ in read_metrics(run / "logs" / "metrics.jsonl"))


def _killed_at(command: list[str], environment: dict[str, str], run: Path, mark: int) -> bool:
    """Start the run and kill it as soon as it has made `mark` steps of progress; False when it ended before that."""
    start = _progress_marks(run)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment
    )
    deadline = time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < deadline
        if _progress_marks(run) - start >= mark:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)  # polling interval, not a synchronisation: the kill waits for the mark
    assert process.returncode == 0
    return False


@pytest.mark.slow
def test_stopped_and_killed_runs_end_with_the_same_student(
    kdscale: Cli, kdscale_environment: dict[str, str], tiny_config: Path
) -> None:
    unbroken, broken = tiny_config.parent / "unbroken", tiny_config.parent / "broken"
    assert kdscale("distill", tiny_config, "--set", f"run_dir={unbroken}").code == 0
    command = [sys.executable, "-m", "kdscale.cli.main", "distill", str(tiny_config), "--set", f"run_dir={broken}"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=kdscale_environment
    )
    while process.poll() is None and not any(read_metrics(broken / "logs" / "metrics.jsonl")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "run the same command again" in err
    assert json.loads((broken / "status.json").read_text())["stages"]["distill"]["state"] == "interrupted"
    assert _killed_at(command, kdscale_environment, broken, 3)  # after a few steps of those that were left
    outcome = kdscale("distill", tiny_config, "--set", f"run_dir={broken}")
    assert outcome.code == 0, outcome.err
    assert digests(broken / "student") == digests(unbroken / "student")
    rows = [row["step"] for row in read_metrics(broken / "logs" / "metrics.jsonl") if row["kind"] == "train"]
    assert rows == list(range(1, len(rows) + 1))  # no step lost, none twice
