"""What the commands print of a run folder."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kdscale.cli import tables
from kdscale.jobs.doctor import Finding
from kdscale.pipeline.stages.registry import STAGES
from kdscale.runs.folder import RunFolder

QUALITY = {"perplexity": 37.754, "bits_per_byte": 1.2, "kl_to_teacher": None, "top1_agreement": None}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "config.yaml").write_text("name: tables\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "eval").mkdir()
    return tmp_path


def test_status_writes_counts_in_full(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"kind": "train", "step": 1200, "tokens": 1_234_567, "loss": 1.5, "lr": 4e-5, "tokens_per_second": 273.87}
    (run / "logs" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    facts = {"train tokens": 1_623_838, "self-check": "passed"}
    entry = {"state": "done", "seconds": 201.9, "facts": facts}
    (run / "status.json").write_text(json.dumps({"stages": {"data": entry}}))
    tables.status(run)
    out = capsys.readouterr().out
    assert "training: step 1,200 · 1,234,567 tokens · loss 1.5000 · learning rate 4e-05 · 274 tokens/s" in out
    assert "train tokens 1,623,838 · self-check passed" in out
    assert "3 min 22 s" in out
    assert "e+0" not in out


def test_what_a_finding_says_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    tables.findings("t", [Finding("x", "note", "needs `pip install 'kdscale[gguf]'` [/] :smile:")])
    assert "note  needs `pip install 'kdscale[gguf]'` [/] :smile:" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["teacher", "distilled"], ["teacher", "pruned", "distilled", "quantized"]])
def test_the_results_are_those_of_all_models(run: Path, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    models = {name: {"quality": QUALITY} for name in names}
    (run / "eval" / "eval.json").write_text(json.dumps({"models": models}))
    tables.results(run, "eval")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == names
    assert lines[2].split() == ["perplexity", *["37.75"] * len(names)]


MEASURED = json.dumps({"models": {"a": {"quality": QUALITY}, "b": {"quality": QUALITY}}})


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "null", "{", '{"models": {"a": 1}}', '{"models": {"a": {"quality": {"perplexity": "x"}}}}',
        *(f'{MEASURED[:-1]}, "differences": {wrong}}}' for wrong in ("[]", '{"x": 1}', '{"x": {"ce": "x"}}')),
    ],
)  # fmt: skip
def test_a_damaged_evaluation_is_reported_and_not_shown(
    run: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "eval" / "eval.json").write_text(text)
    tables.results(run, "eval")
    assert "is damaged" in "".join(capsys.readouterr().out.splitlines())


def test_the_results_name_what_got_worse(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {
        name: {"quality": QUALITY | {"kl_to_teacher": kl}} for name, kl in {"pruned": 1.31, "distilled": 1.59}.items()
    }
    (run / "eval" / "eval.json").write_text(json.dumps({"models": models}))
    tables.results(run, "eval")
    assert (
        "worse in the distilled student than in the pruned one: KL to the teacher 1.310 → 1.590"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(("step", "text"), [(20, " · 50 % done · 40.0 s left once it runs again"), (40, "")])
def test_status_says_how_long_training_still_takes_and_where_results_are(
    run: Path, step: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_text(
        "name: t\nrun_dir: r\nteacher: {path: t}\nprune: {ffn: 8}\n"
        "distill: {tokens: 633, seq_len: 8, global_batch: 2, micro_batch: 2}\n"
    )
    rows = [{"kind": "train", "step": at + 1, "loss": 1.5, "seconds": 2.0} for at in range(step)]
    (run / "logs" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {name: {"quality": QUALITY} for name in ("teacher", "distilled")}
    (run / "eval" / "eval.json").write_text(json.dumps({"models": models}))
    tables.status(run)
    out = capsys.readouterr().out
    assert f"training: step {step}{text} · loss 1.5000\n" in out
    assert f"go on with: kdscale run {run}\n" in out
    assert "perplexity" in out
    assert f"training curve  {run / 'logs' / 'metrics.jsonl'}" in out


def test_status_says_how_long_a_stage_has_been_running(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    since = (datetime.now(UTC) - timedelta(minutes=5)).isoformat(timespec="seconds")
    for time, text in ((since, "5 min 0"), ("yesterday", "running")):
        stages = {"prune": {"state": "running", "time": time}}
        (run / "status.json").write_text(json.dumps({"stages": stages}))
        with RunFolder(run).lock():
            tables.status(run)
        out = capsys.readouterr().out
        assert text in out
        assert "go on with" not in out  # it does


def test_a_finished_run_is_told_nothing_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "status.json").write_text(json.dumps({"stages": {name: {"state": "done"} for name in STAGES}}))
    tables.status(run)
    assert "go on with" not in capsys.readouterr().out
