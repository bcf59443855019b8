"""What somebody does who has just installed kdscale: start a service, submit a run, watch, pause, resume, download."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdscale.client import Client
from kdscale.files import sha256_file
from tests.integration.service.test_pause_and_resume import SMALL

_SECONDS = 240.0


@pytest.fixture
def served(
    tmp_path: Path, kdscale_environment: dict[str, str], tiny_llama_dir: Path
) -> Iterator[tuple[str, Path, subprocess.Popen[str]]]:
    """The address of a service that `kdscale serve` started, its home folder and its process."""
    home = tmp_path / "home"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "kdscale.cli.main", "serve", "--home", str(home), "--port", "0",
            "--root", str(tmp_path), "--root", str(tiny_llama_dir),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=kdscale_environment, cwd=tmp_path,
    )  # fmt: skip
    ends = threading.Timer(_SECONDS, process.kill)  # closes the pipe that is read below
    ends.start()
    try:
        assert process.stdout is not None
        lines = []
        while not (lines and lines[-1].startswith("Ctrl-C")):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        yield re.search(r"^open +(\S+)$", "".join(lines), re.MULTILINE)[1], home, process  # type: ignore[index]
    finally:
        ends.cancel()
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.long
def test_the_way_of_a_stranger(
    served: tuple[str, Path, subprocess.Popen[str]], tiny_config: Path, tmp_path: Path,
    kdscale_environment: dict[str, str],
) -> None:  # fmt: skip
    url, home, process = served
    environment = {**kdscale_environment, "XDG_CONFIG_HOME": str(tmp_path / "settings"), "KDSCALE_SERVER": url}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kdscale.cli.main", *arguments], capture_output=True, text=True, check=False,
            env=environment, cwd=tmp_path, timeout=_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("login", "--token-file", str(home / "first-token"))
    secret = (home / "first-token").read_text().strip()
    settings = [part for setting in (*SMALL, "distill.tokens=6400") for part in ("--set", setting)]
    run = re.search(r"as (\S+);", command("submit", str(tiny_config), *settings))[1]  # type: ignore[index]

    with Client(url, secret) as client:
        other = client.rerun(run, name="other")  # it waits for the only slot
        assert client.cancel(other.id).state == "cancelled"
        events = client.events(run)
        last = next(found.seq for found in events if found.data.get("stage") == "distill")
        assert client.pause(run).state == "pausing"  # a command would take a second to start
        states = (found.data["state"] for found in client.events(run, after=last) if found.type == "state")
        assert next(state for state in states if state != "pausing") == "paused"
        command("resume", run)
        following = subprocess.Popen(
            [sys.executable, "-m", "kdscale.cli.main", "logs", run, "--follow"], stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        states = [found.data["state"] for found in client.events(run, after=last) if found.type == "state"]
        assert states[-4:] == ["queued", "starting", "running", "succeeded"]
        printed = following.communicate(timeout=_SECONDS)[0]
        assert "distilled student:" in printed
        assert client.report(run).startswith(b"<!doctype html>")

    command("download", run, "--out", "here")
    ours, theirs = (folder / "student" / "model.safetensors" for folder in (tmp_path / "here", home / "runs" / run))
    assert sha256_file(ours) == sha256_file(theirs)
    assert "distilled" in command("compare", run, other.id, "--server", url).lower()

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert secret not in (home / "service.log").read_text()
    assert (home / "first-token").stat().st_mode & 0o077 == 0
