"""A real run that moves: paused on hosts, paused in a pod, ended by a Slurm script; the unbroken run's bytes.

What the engines hand over is run on this machine: the launcher over a stand-in for ssh, the pod's command, the script.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import dump_config, load_config
from kdscale.files import sha256_file
from kdscale.runs.metrics_log import read_metrics
from kdscale.service.engines import programs
from kdscale.service.engines.engine import Job
from kdscale.service.engines.hosts import HostsEngine
from kdscale.service.engines.marks import end_marked
from kdscale.service.settings import ServiceSettings
from tests.unit.service.engines.benches import KubernetesBench, SlurmBench

_SECONDS = 240.0
_STEPS = 300  # enough that a run still goes on when a stop has reached it
SMALL = [
    f"distill.tokens={64 * _STEPS}", "distill.seq_len=32", "distill.global_batch=2", "distill.checkpoint_every=1000",
    "distill.validate_every=1000", "eval.efficiency=false", "prune.compensate=none", "runtime.threads=1",
    "runtime.device=cpu",
]  # fmt: skip
SRUN = '#!/bin/sh\nshift\nexport SLURM_PROCID=0 SLURM_LOCALID=0\nexec "$@"\n'
SCONTROL = "#!/bin/sh\necho 127.0.0.1\n"


@pytest.fixture
def job(tmp_path: Path, tiny_config: Path, kdscale_environment: dict[str, str], monkeypatch: Any) -> Iterator[Job]:
    """The first attempt; the run's processes find this checkout."""
    for name, value in kdscale_environment.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "home" / "runs" / "0abcdefgh-0000001"
    folder.mkdir(parents=True)
    config = folder / "config.yaml"  # as the scheduler writes it
    config.write_text(dump_config(load_config(tiny_config, [*SMALL, f"run_dir={folder}"])))
    yield Job("0abcdefgh-0000001", 1, folder, config, tmp_path / "home" / "jobs" / "0abcdefgh-0000001" / "1")
    assert end_marked(str(tmp_path / "home" / "jobs" / "0abcdefgh-0000001" / "1"))


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def steps(job: Job) -> int:
    path = job.folder / "logs" / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(path) if row["kind"] == "train"), default=0) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_moves_between_engines(
    tmp_path: Path, tiny_config: Path, job: Job, fake_ssh: Path, kdscale: Callable[..., Any], monkeypatch: Any
) -> None:
    unbroken = tmp_path / "unbroken"
    settings = [part for item in (*SMALL, f"run_dir={unbroken}") for part in ("--set", item)]
    assert kdscale("run", tiny_config, *settings).code == 0

    (tmp_path / "hosts").write_text("here slots=1\n")
    own = {"hostfile": str(tmp_path / "hosts"), "ssh_command": str(fake_ssh), "master_addr": "127.0.0.1"}
    hosts = HostsEngine(ServiceSettings(home=str(tmp_path / "home"), engines={"hosts": own}))
    handle = hosts.submit(job)
    until(lambda: steps(job) >= 2 or hosts.state(handle).phase != "running")
    hosts.cancel(handle, grace=60.0)
    until(lambda: hosts.state(handle).phase == "ended")
    assert hosts.state(handle).exit_code == 75, hosts.logs(handle, 4000).decode()
    first = steps(job)
    assert 2 <= first < _STEPS

    second = dataclasses.replace(job, attempt=2, work=job.work.with_name("2"))
    (tmp_path / "kubernetes").mkdir()
    cluster = KubernetesBench(tmp_path / "kubernetes", python=sys.executable, cwd=str(tmp_path))
    monkeypatch.setattr(programs, "_run", cluster.run)
    handle = cluster.engine().submit(second)
    (jobset,) = cluster.read()["objects"]["default"].values()
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    command = [word.replace("$$", "$") for word in pod["command"]]
    command[command.index("--master-addr") + 1] = "127.0.0.1"
    variables = {item["name"]: item["value"].replace("$$", "$") for item in pod["env"]}
    node = subprocess.Popen(
        command, env={**os.environ, **variables, "JOB_COMPLETION_INDEX": "0"}, cwd=pod["workingDir"]
    )
    cluster.begin(second)
    until(lambda: steps(job) >= first + 2 or node.poll() is not None)
    cluster.engine().cancel(handle, grace=60.0)
    assert node.wait(_SECONDS) == 0
    cluster.update(second, False, {"conditions": [{"type": "Completed", "status": "True"}]})
    assert cluster.state(handle).exit_code == 75
    assert first + 2 <= steps(job) < _STEPS

    third = dataclasses.replace(job, attempt=3, work=job.work.with_name("3"))
    (tmp_path / "slurm").mkdir()
    slurm = SlurmBench(tmp_path / "slurm", python=sys.executable, cwd=str(tmp_path), check=False)
    monkeypatch.setattr(programs, "_run", slurm.run)
    handle = slurm.engine().submit(third)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (slurm.tools / name).write_text(text)
        (slurm.tools / name).chmod(0o755)
    slurm_environment = {
        **os.environ, "PATH": f"{slurm.tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "1000",
        "SLURM_JOB_NODELIST": "n1",
    }  # fmt: skip
    subprocess.run(["bash", str(third.work / "job.sbatch")], env=slurm_environment, check=True, timeout=_SECONDS)
    slurm.vanish(third)
    assert slurm.state(handle).exit_code == 0  # from its note: Slurm has forgotten it
    for name in ("student/model.safetensors", "pruned/model.safetensors"):
        assert sha256_file(job.folder / name) == sha256_file(unbroken / name)
