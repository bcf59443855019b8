"""Launching through something else: DeepSpeed's runner, Slurm, Kubernetes, torchrun. Prints, or prints and executes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdscale.errors import ConfigError, RunFolderError
from kdscale.files import write_text
from kdscale.jobs.launch import RANK_MODULE, LaunchRequest, preflight_command, python_path, rank_command, rank_defaults
from kdscale.runtime.exits import FINAL_CODES
from kdscale_launch import HostsJob, LaunchError
from kdscale_launch.environment import forwarded_variables, masked_lines, without_secrets
from kdscale_launch.systems import kubernetes as kube
from kdscale_launch.systems import slurm, torchrun_deepspeed


@dataclass(frozen=True)
class Common:
    """What all job systems are told."""

    asked: LaunchRequest
    python: str
    nodes: int
    slots: int
    max_restarts: int
    export: tuple[str, ...]
    dry_run: bool

    def environment(self) -> dict[str, str]:
        """Forwarded variables without secrets: they would stand in a script or manifest for all to read."""
        path = python_path()
        found = {
            **rank_defaults(),
            **forwarded_variables(os.environ, self.export),
            **({"PYTHONPATH": path} if path else {}),
        }
        return without_secrets(found)


@dataclass(frozen=True)
class PodOptions:
    image: str
    namespace: str
    volumes: tuple[str, ...]
    secrets: tuple[str, ...]
    gpus: int
    grace: float
    pytorchjob: bool


def run_deepspeed(
    asked: LaunchRequest, job: HostsJob, hostfile: Path, ssh_options: Sequence[str], dry_run: bool
) -> int:
    """DeepSpeed's runner, watched by nobody but itself; started again after failures."""
    env_file = asked.logs / "deepspeed_env"
    if job.master_port == 0 or not job.master_addr:
        raise ConfigError("--launcher deepspeed", expected="--master-addr and --master-port")
    try:
        command = torchrun_deepspeed.deepspeed(
            job.reach.python, RANK_MODULE, asked.arguments, hostfile=str(hostfile.absolute()),
            master_addr=job.master_addr, master_port=job.master_port,
        )  # fmt: skip
    except LaunchError as error:
        raise ConfigError(str(error)) from error
    environment = torchrun_deepspeed.deepspeed_environment(shlex.join(ssh_options), str(env_file), job.reach.dead_after)
    text = torchrun_deepspeed.env_file(without_secrets(job.env))
    if dry_run:
        print(f"# {env_file}\n{text}")
    else:
        write_text(env_file, text)
    return _execute(command, environment, dry_run, tries=job.max_restarts + 1)


def submit_slurm(common: Common, time_limit: str, warn: int, directives: tuple[str, ...], check: bool) -> int:
    """The script goes into the run folder's logs and from there to sbatch."""
    probe = preflight_command(common.asked, common.python, "collective", "120")
    job = slurm.SlurmJob(
        name=f"kdscale-{common.asked.config.name}",
        nodes=common.nodes,
        slots=common.slots,
        command=rank_command(common.asked, common.python),
        check=probe if check else (),
        cwd=str(Path.cwd()),
        output=str(common.asked.logs / "slurm-%j.out"),
        env=common.environment(),
        time_limit=time_limit,
        warn_seconds=warn,
        max_restarts=common.max_restarts,
        final_codes=FINAL_CODES,
        directives=directives,
    )
    try:
        script = slurm.render(job)
    except LaunchError as error:
        raise ConfigError("--sbatch", got=str(error)) from error
    path = common.asked.logs / "job.sbatch"
    if common.dry_run:
        print(script)
    else:
        write_text(path, script)  # and the folder for Slurm's output, without which the job would not start
    return _execute(["sbatch", "--parsable", str(path)], {}, common.dry_run)


def apply_kubernetes(common: Common, pods: PodOptions, port: int) -> int:
    if not pods.image:
        raise ConfigError("--kubernetes", expected="--image, a container image with kdscale in it")
    volumes = dict(_volume(text) for text in pods.volumes)
    try:
        job = kube.KubernetesJob(
            name=re.sub(r"[^a-z0-9-]+", "-", f"kdscale-{common.asked.config.name}".lower())[:40].strip("-"),
            nodes=common.nodes,
            slots=common.slots,
            image=pods.image,
            command=rank_command(common.asked, common.python),
            python=common.python,
            log_dir=str(common.asked.logs / "ranks"),
            cwd=str(Path.cwd()),
            namespace=pods.namespace,
            env=common.environment(),
            secrets=pods.secrets,
            volumes=volumes,
            gpus=pods.gpus,
            port=port,
            max_restarts=common.max_restarts,
            grace=pods.grace,
            final_codes=FINAL_CODES,
        )
    except LaunchError as error:
        raise ConfigError("--kubernetes", got=str(error)) from error
    objects = kube.pytorch_job(job) if pods.pytorchjob else kube.indexed_job(job)
    manifest = json.dumps(kube.as_list(objects), indent=2)
    if common.dry_run:
        print(manifest)
    return _execute(["kubectl", "apply", "-f", "-"], {}, common.dry_run, stdin=manifest)


def _volume(text: str) -> tuple[str, str]:
    claim, colon, path = text.partition(":")
    if not colon or not claim or not path.startswith("/"):
        raise ConfigError(f"--volume {text}", expected="CLAIM:/PATH")
    return claim, path


def run_torchrun(common: Common, endpoint: str) -> int:
    command = torchrun_deepspeed.torchrun(
        common.python, RANK_MODULE, common.asked.arguments, nodes=common.nodes, slots=common.slots, endpoint=endpoint,
        job_id=f"kdscale-{common.asked.config.name}", max_restarts=common.max_restarts,
    )  # fmt: skip
    return _execute(command, {**rank_defaults(), **torchrun_deepspeed.TORCHRUN_ENVIRONMENT}, common.dry_run)


def _execute(
    command: Sequence[str], environment: Mapping[str, str], dry_run: bool, stdin: str | None = None, tries: int = 1
) -> int:
    """Print the command with the variables it is given, and run it. Returns its exit code."""
    print(shlex.join([*(["env", *masked_lines(environment)] if environment else []), *command]), flush=True)
    if dry_run:
        return 0
    code = 0
    for number in range(tries):
        try:
            done = subprocess.run(list(command), env={**os.environ, **environment}, input=stdin, text=True, check=False)
        except OSError as error:
            raise RunFolderError(f"cannot start {command[0]}", got=str(error.strerror)) from error
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        if code == 0 or code in FINAL_CODES:
            break
        if number + 1 < tries:
            print(f"broke with exit code {code}: restart {number + 1} of {tries - 1}", file=sys.stderr, flush=True)
    return code
