"""The command that reaches other machines: `kdscale launch` itself takes it, and prints what it would do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdscale.cli.main import make_app
from kdscale.errors import ConfigError
from kdscale.service.engines.hosts import HostsEngine
from kdscale.service.settings import ServiceSettings
from tests.unit.service.engines.benches import HostsBench


def test_the_launcher_takes_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    own = {
        "hostfile": str(tmp_path / "hosts"),
        "python": "/shared/python",
        "ssh_command": "ssh -p 2222",
        "restarts": 5,
        "master_addr": "10.0.0.1",
    }
    engine = HostsEngine(ServiceSettings(home=str(tmp_path), engines={"hosts": {**own, "export": ["MY_SETTING"]}}))
    command = engine._command(HostsBench(tmp_path).job(target={"min_nodes": 1}))
    assert command[:5] == ["env", "SSH_AUTH_SOCK=/run/agent", sys.executable, "-m", "kdscale.cli.main"]
    assert not make_app()([*command[5:], "--dry-run"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "ssh -p 2222" in printed
    assert "/shared/python -m kdscale.jobs.rank" in printed
    assert "# restarts: at most 5" in printed
    assert "#   MASTER_ADDR=10.0.0.1" in printed
    assert "also on 1 of 2" in printed


@pytest.mark.parametrize("text", [None, "", "node slots=x\n", "-oProxyCommand=x slots=1\n", "a;b slots=1\n"])
def test_hosts_that_are_none_are_refused(tmp_path: Path, text: str | None) -> None:
    target = {"hostfile": str(tmp_path / "hosts")}
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    engine = HostsEngine(ServiceSettings(home=str(tmp_path)))
    with pytest.raises(ConfigError, match="hostfile"):
        engine.submit(HostsBench(tmp_path).job(target=target))
    with pytest.raises(ConfigError, match=r"target\.hostfile"):
        engine.submit(HostsBench(tmp_path).job())
