"""Every table that a command prints fits a terminal of eighty columns, whole, with the widest that it may hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.cli import replay, tables
from kdscale.cli.plan_cluster import plan_cluster_command
from kdscale.jobs.doctor import Finding
from kdscale.pipeline.stages.registry import STAGES
from kdscale.report.comparison import FIGURES

TEACHER = Path(__file__).resolve().parents[2] / "fixtures" / "teachers" / "Llama-3.1-8B"
SHAPE = {"hidden": 16384, "ffn": 53248, "heads": 128, "kv_heads": 16, "layers": 126, "experts": 256, "vocab": 256000}
CANDIDATE = {
    **SHAPE, "params": 405_853_388_800, "active": 37_234_567_890, "bytes": 811_706_777_600, "kv_bytes": 516_096,
    "decode_ms": 1234.5, "prefill_ms": 98765.4, "score": -12.345, "masked": {"kl": 1.23456, "loss": 12.34567},
    "probes": [{"loss": 12.34567}],
}  # fmt: skip
PARAMS = {"total": 405_853_388_800, "non_embedding": 401_659_084_800, "active": 37_234_567_890}
PLAN = {
    "teacher": SHAPE, "student": SHAPE, "teacher_params": PARAMS, "student_params": PARAMS, "candidates_tried": 123_456,
    "candidates": [CANDIDATE, {**CANDIDATE, **{axis: size - 8 for axis, size in SHAPE.items()}}],
    "methods": {"search": "masked"}, "target": {"asked": "12.5ms"}, "warnings": ["a long warning " * 12],
}  # fmt: skip
QUALITY = {figure.key: 123456.789 for figure in FIGURES if figure.section == "quality"}
QUALITY |= {"perplexity": 123456.789, "bits_per_byte": 12.3456, "kl_to_teacher": 12.3456, "top1_agreement": 0.9999}
REPLAY = {
    "step": 123456, "of_this_step": True, "loss": 12.345678, "grad_norm": 1234.5678, "logged_loss": 12.345678,
    "logged_grad_norm": 1234.5678, "same_bits": True, "losses": ["loss", "kd", "ce"], "gradient_norms": {},
    "sequences": [
        {
            "number": 1152, "loss": 12.345678, "kd": 12.345678, "ce": 12.345678, "text": "Once upon a time " * 9,
            "documents": [{"id": 12345678, "source": "a-long-name-of-a-source-of-text.jsonl.gz"}] * 3,
        }
    ],
}  # fmt: skip


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a call prints on eighty columns; no line is longer, and nothing is cut with an ellipsis."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        function(*arguments, **options)
        out = capsys.readouterr().out
        assert [line for line in out.splitlines() if len(line) > 80] == []
        assert "…" not in out
        return out

    return call


def test_the_plan(shown: Callable[..., str]) -> None:
    out = shown(tables.plan, PLAN, 10**12)
    assert "chosen" in out
    assert "53248" in out
    assert "not shown for lack of room (plan.json has them): KV/tok, on disk, loss, active" in out


def test_a_plan_with_room_shows_all(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = {axis: SHAPE[axis] for axis in ("ffn", "heads")}
    rows = [{**CANDIDATE, "masked": None, "probes": [], "decode_ms": None, "prefill_ms": None}]
    rows += [{**rows[0], "ffn": 512, "heads": 8}]
    out = shown(tables.plan, {**PLAN, "student": few, "teacher": few, "candidates": rows}, 10**12)
    assert "KV/tok" in out
    assert "not shown" not in out


def test_findings_of_doctor_and_preflight(shown: Callable[..., str]) -> None:
    lines = [Finding("bf16 on this CPU", "bad", "/a/long/path/" * 9), Finding("speed", "note", "word " * 40)]
    assert "bf16 on this CPU" in shown(tables.findings, "This machine", lines)


def test_status_with_results(shown: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a-name")
    for name in ("logs", "eval"):
        (run / name).mkdir(parents=True)
    (run / "config.yaml").write_text("name: t\n")
    facts = {"tokens": 1_234_567_890, "scores": ", ".join(f"axis{i}.output_energy" for i in range(9))}
    stages = {name: {"state": "interrupted", "seconds": 99_999.9, "facts": facts} for name in STAGES}
    (run / "status.json").write_text(json.dumps({"stages": stages}))
    row = {"step": 1_234_567, "tokens": 94 * 10**9, "loss": 12.3456, "lr": 1.234e-5, "tokens_per_second": 1_234_567.8}
    (run / "logs" / "metrics.jsonl").write_text(json.dumps({"kind": "train", **row}) + "\n")
    models = {name: {"quality": QUALITY} for name in ("teacher", "pruned", "distilled", "quantized")}
    (run / "eval" / "eval.json").write_text(json.dumps({"models": models}))
    out = shown(tables.status, run)
    assert "123456.79" in out
    assert "27 h 46 min" in out


@pytest.mark.parametrize("options", [{"nodes": 16, "gpu": "h200"}, {"nodes": 1, "gpu": "a100-40"}])
def test_settings_of_a_cluster(shown: Callable[..., str], options: dict[str, Any]) -> None:
    config = {"config": "llama3.1-8b-to-4.5b-width", "set_": [f"teacher.path={TEACHER}"], "everything": True}
    out = shown(plan_cluster_command, **config, **options)
    assert "partitioned" in out
    assert "no faster" in out
    assert "own GPUs: the teacher needs GPUs of its own" in out


def test_sequences_of_a_replayed_step(shown: Callable[..., str]) -> None:
    assert "12.3457" in shown(replay._show, REPLAY)
