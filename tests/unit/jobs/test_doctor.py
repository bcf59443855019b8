"""The doctor: what it finds here, and what it concludes from what it found."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from kdscale.jobs import doctor
from kdscale.jobs.doctor import CudaDevice, Examination, Finding


def test_it_finds_what_is_here(tmp_path: Path) -> None:
    findings = {finding.topic: finding for finding in doctor.examine(tmp_path).findings}
    import torch

    assert torch.__version__ in findings["torch"].text
    assert {"python", "device", "deepspeed", "triton", "memory", "disk", "loopback port"} <= set(findings)
    assert all(finding.severity != "bad" for finding in findings.values())


def test_it_says_what_is_in_the_way() -> None:
    findings = [Finding("torch", "bad", "not installed"), Finding("device", "note", "unknown without torch")]
    core, *_ = doctor.verdicts(Examination(findings))
    assert (core.severity, core.text) == ("bad", "fix first: torch")


def test_it_reports_an_unwritable_folder() -> None:
    findings = doctor.examine(Path("/proc/x")).findings
    assert any(finding.topic == "write access" and finding.severity == "bad" for finding in findings)


@pytest.mark.parametrize(
    ("text", "gpus", "severity"),
    [("MI300X, 192 GiB", (CudaDevice("MI300X", 192 << 30),), "ok"), ("cuda is broken: CPU, 8 cores", (), "note")],
)
def test_whether_there_is_a_gpu_does_not_depend_on_the_text_shown(
    text: str, gpus: tuple[CudaDevice, ...], severity: str
) -> None:
    verdicts = doctor.verdicts(Examination([Finding("device", "ok", text)], gpus))
    assert {verdict.topic: verdict.severity for verdict in verdicts}["speed"] == severity


def test_damaged_metadata_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> str:
        raise OSError(f"{name}: metadata cannot be read")

    monkeypatch.setattr(metadata, "version", broken)
    findings = {finding.topic: finding for finding in doctor.examine(tmp_path).findings}
    assert (findings["safetensors"].severity, findings["triton"].severity) == ("bad", "note")
