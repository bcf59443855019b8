"""`kdscale launch` on two "hosts" of this machine: a broken job ends with the unbroken one's student."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kdscale.config.load import load_config
from kdscale.pipeline.runner import run_until
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter

HOSTS = "one slots=1\ntwo slots=1\n"
SETTINGS = ("runtime.threads=1", "runtime.device=cpu", "distill.tokens=7680")
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny_config: Path, fake_ssh: Path, kdscale_environment: dict[str, str]) -> Start:
    """`start("name", option, ...)`: a job in its own run folder, with an exact number of threads."""
    (tiny_config.parent / "hosts").write_text(HOSTS)

    def launch(name: str, *options: str) -> subprocess.Popen[str]:
        fixed = (*SETTINGS, f"run_dir={tiny_config.parent}/{name}")
        command = [
            sys.executable, "-m", "kdscale.cli.main", "launch", str(tiny_config), "--hostfile",
            str(tiny_config.parent / "hosts"), "--ssh-command", str(fake_ssh), "--master-addr", "127.0.0.1",
            "--until", "distill", *[part for item in fixed for part in ("--set", item)], *options,
        ]  # fmt: skip
        return subprocess.Popen(
            command, env=kdscale_environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return launch


def output_at_end(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == code, output
    return output


def curve(run: Path) -> list[tuple[int, float]]:
    rows = read_metrics(run / "logs" / "metrics.jsonl")
    return [(int(row["step"]), row["loss"]) for row in rows if row["kind"] == "train"]


def steps(run: Path) -> list[int]:
    return [step for step, _ in curve(run)]


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(steps(run)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)  # between two looks


def rank_process(number: int, launcher: subprocess.Popen[str]) -> psutil.Process:
    """Started by an agent, which was started by the stand-in for ssh."""
    (rank,) = [process for process in ranks(launcher) if process.environ()["RANK"] == str(number)]
    return rank


def ranks(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher.pid).children(recursive=True) if "kdscale.jobs.rank" in p.cmdline()]


def student(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "student").iterdir())}


def copy_without_distillation(run: Path, other: Path) -> None:
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("student", "checkpoints", "logs", "distill*.json"))


@pytest.mark.slow
def test_a_broken_job_starts_again_and_ends_with_the_unbroken_ones_student(start: Start, tiny_config: Path) -> None:
    unbroken, broken = tiny_config.parent / "unbroken", tiny_config.parent / "broken"
    output = output_at_end(start("unbroken"), 0)
    assert "collective" in output  # preflight ran, all ranks met
    assert "bad" not in output
    assert not list(unbroken.rglob(".preflight-*"))

    copy_without_distillation(unbroken, broken)
    process = start("broken", "--skip-preflight", "--accept-changes", "--max-restarts", "1")
    wait_for_steps(broken, 8, process)
    rank_process(1, process).kill()
    output = output_at_end(process, 0)
    assert "host two, rank 1: was killed by signal 9" in output
    assert "restart 1 of 1" in output
    assert "going on from step" in output
    assert steps(broken) == steps(unbroken) == list(range(1, 31))
    assert student(broken) == student(unbroken)
    assert len(list((broken / "logs" / "ranks").glob("*/rank-1.log"))) == 2


@pytest.mark.slow
@pytest.mark.long
def test_a_host_that_stays_away_is_done_without_and_used_again(start: Start, tiny_config: Path, fake_ssh: Path) -> None:
    folder = tiny_config.parent
    away = folder / "away-two"
    refusal = f'[ -e "{folder}/away-$1" ] && {{ echo no route >&2; exit 255; }}'
    fake_ssh.write_text(fake_ssh.read_text().replace("\nshift\n", f"\n{refusal}\nshift\n"))
    alone, elastic = folder / "alone", folder / "elastic"
    # the same run by this process
    run_until(load_config(tiny_config, [*SETTINGS, f"run_dir={alone}"]), "distill", Reporter(quiet=True))
    copy_without_distillation(alone, elastic)
    process = start(
        "elastic", "--skip-preflight", "--accept-changes", "--min-nodes", "1", "--host-timeout", "1", "--dead-after",
        "3", "--set", "distill.zero_stage=3",
    )  # fmt: skip
    wait_for_steps(elastic, 5, process)
    away.touch()
    rank_process(1, process).parent().kill()  # its agent: the whole host is gone, and stays so
    here = len(steps(elastic))
    wait_for_steps(elastic, here + 4, process)
    assert len(ranks(process)) == 1
    away.unlink()
    rank_process(0, process).kill()
    output = output_at_end(process, 0)
    assert "host two: lost: the connection ended" in output
    assert "going on with 1 of 2 hosts (1 ranks)" in output
    assert "all 2 hosts are back" in output
    assert steps(elastic) == steps(alone) == list(range(1, 31))
    # the same documents in every step
    assert dict(curve(elastic)) == pytest.approx(dict(curve(alone)), rel=1e-5)
    weights, expected = (load_file(run / "student" / "model.safetensors") for run in (elastic, alone))
    assert all(torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5) for name, tensor in weights.items())
    again = start("elastic", "--skip-preflight", "--set", "distill.zero_stage=3")
    assert "done before" in output_at_end(again, 0)  # the second host is sent home


def test_a_waiting_rank_leaves_with_75_on_sigterm(tiny_config: Path, kdscale_environment: dict[str, str]) -> None:
    with socket.socket() as nobody:  # bound, not listening: whoever knocks is refused
        nobody.bind(("127.0.0.1", 0))
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(nobody.getsockname()[1])
        command = [sys.executable, "-m", "kdscale.jobs.rank", str(tiny_config), "distill.processes=2"]
        process = subprocess.Popen(command, env={**kdscale_environment, **place})
        caught = 1 << (signal.SIGTERM - 1)
        while not int(_status(process.pid)["SigCgt"], 16) & caught:  # until its handler is in place
            assert process.poll() is None
            time.sleep(0.005)
        process.terminate()
        assert process.wait(60) == 75


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
