"""A DeepSpeed that would add gradients up wrongly is refused before any work."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from kdscale.distill.parallel.process_group import join_group
from kdscale.errors import MachineError
from kdscale.jobs import doctor
from kdscale.runtime import versions

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("installed", "old"),
    [("0.19.7", True), ("0.19.10", False), ("0.19.8+cu128", False), ("0.9.5", True), ("1.0", False), (None, False),
     ("not a version", False)],
)  # fmt: skip
def test_versions_are_compared_as_versions(monkeypatch: pytest.MonkeyPatch, installed: str | None, old: bool) -> None:
    monkeypatch.setattr(versions, "version_of", lambda _: installed)
    assert versions.is_too_old("deepspeed", installed) == old
    if old:
        with pytest.raises(MachineError, match=rf"0\.19\.8 or newer(.|\n)*{installed}(.|\n)*pip install"):
            join_group(torch.device("cpu"))


def test_the_doctor_says_which_version_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = versions.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.19.7" if name == "deepspeed" else real(name))
    findings = {finding.topic: finding for finding in doctor.examine(tmp_path).findings}
    assert (findings["deepspeed"].severity, findings["deepspeed"].text) == ("bad", "0.19.7; 0.19.8 or newer is needed")
    assert findings["torch"].severity == "ok"


def test_the_package_asks_for_the_same_versions() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {f"{name}>={oldest}" for name, oldest in versions.OLDEST.items()} <= set(asked)
