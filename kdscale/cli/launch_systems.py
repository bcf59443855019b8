"""Launching through another program: DeepSpeed's runner, Slurm, Kubernetes or torchrun. Prints what it executes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdscale.errors import ConfigError, MissingProgramError
from kdscale.files import write_text
from kdscale.jobs.launch import RANK_MODULE, LaunchRequest, launcher_errors, python_path, rank_defaults
from kdscale.runtime.exits import FINAL_CODES
from kdscale_launch import HostsJob
from kdscale_launch.environment import forwarded_variables, masked_lines, without_credentials, without_secrets
from kdscale_launch.job import shell_exit_code
from kdscale_launch.systems import kubernetes as kube
from kdscale_launch.systems import slurm, torchrun_deepspeed


@dataclass(frozen=True)
class JobOptions:
    """The options that Slurm, Kubernetes and torchrun share."""

    request: LaunchRequest
    python: str
    nodes: int
    slots: int
    max_restarts: int
    export: tuple[str, ...]
    dry_run: bool

    @property
    def rank_command(self) -> tuple[str, ...]:
        """The command of every rank."""
        return self.request.rank_command(self.python)

    def environment(self) -> dict[str, str]:
        """Forwarded variables without secrets, which everyone could read in a script or a manifest.

        Names those that are left out. Raises ConfigError for a variable that no script can hold.
        """
        path = python_path()
        with launcher_errors():
            variables = {**rank_defaults(), **forwarded_variables(os.environ, self.export)}
        return _written_variables({**variables, **({"PYTHONPATH": path} if path else {})})


@dataclass(frozen=True)
class PodOptions:
    """The options of Kubernetes alone; `volumes` are CLAIM:/PATH."""

    image: str
    namespace: str
    volumes: tuple[str, ...]
    secrets: tuple[str, ...]
    gpus: int
    grace: float
    pytorchjob: bool


def _written_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that may be written to a file; prints the names of the others."""
    written = without_secrets(variables)
    if left_out := sorted(set(variables) - set(written)):
        print(
            f"not written, because they may hold credentials: {', '.join(left_out)}; set them where the ranks start"
            " (sbatch passes its environment on; a pod takes them from --secret)",
            file=sys.stderr,
        )
    return written


def run_deepspeed(request: LaunchRequest, job: HostsJob, hostfile: Path, ssh_options: list[str], dry_run: bool) -> int:
    """Run the job under DeepSpeed's runner, again after failures; returns the exit code."""
    env_file = request.logs / "deepspeed_env"
    if job.master_port == 0 or not job.master_addr:
        raise ConfigError("--launcher deepspeed", expected="--master-addr and --master-port", got="none")
    with launcher_errors():
        command = torchrun_deepspeed.deepspeed(
            job.ssh.python, RANK_MODULE, request.arguments, hostfile=str(hostfile.absolute()),
            master_addr=job.master_addr, master_port=job.master_port, cwd=str(Path.cwd()),
        )  # fmt: skip
        text = torchrun_deepspeed.env_file(_written_variables(job.env))
    environment = torchrun_deepspeed.deepspeed_environment(shlex.join(ssh_options), str(env_file), job.ssh.dead_after)
    if dry_run:
        print(f"# {env_file}\n{text}")
    else:
        write_text(env_file, text)
    return _execute(command, environment, dry_run, tries=job.max_restarts + 1)


@dataclass(frozen=True)
class SlurmOptions:
    """The options of Slurm alone; `check`: add up a number over all ranks first."""

    time_limit: str
    warn: int
    directives: tuple[str, ...]
    check: bool


def submit_slurm(options: JobOptions, slurm_options: SlurmOptions, prepare: JobOptions | None = None) -> int:
    """Write the scripts into the run folder's logs and submit them; returns sbatch's exit code.

    The job starts when that of `prepare`, if given, has ended well, and is cancelled when it has not.
    Raises ConfigError for directives that ask for fewer GPUs than ranks.
    """
    _check_directives(options, slurm_options.directives, prepare is not None)
    logs = options.request.logs
    waits: list[str] = []
    scripts = {logs / "job.sbatch": _slurm_script(options, slurm_options)}
    if prepare is not None:
        alone = replace(slurm_options, check=False)
        scripts = {logs / "prepare.sbatch": _slurm_script(prepare, alone, "-prepare"), **scripts}
    for path, script in scripts.items():
        print(script) if options.dry_run else write_text(path, script)  # the folder is Slurm's output's too
    if prepare is not None:
        code, number = _submit_first(logs / "prepare.sbatch", options.dry_run)
        if code:
            return code
        waits = [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]
    return _execute(["sbatch", "--parsable", *waits, str(logs / "job.sbatch")], {}, options.dry_run)


def _slurm_script(options: JobOptions, settings: SlurmOptions, suffix: str = "") -> str:
    collective = options.request.preflight_command(options.python, "collective", "120")
    with launcher_errors("--slurm"):
        job = slurm.SlurmJob(
            name=f"kdscale-{options.request.config.name}{suffix}", nodes=options.nodes, slots=options.slots,
            command=options.rank_command, check=collective if settings.check else (), cwd=str(Path.cwd()),
            output=slurm.file_pattern(str(options.request.logs)) + "/slurm-%j.out", env=options.environment(),
            time_limit=settings.time_limit, warn_seconds=settings.warn, max_restarts=options.max_restarts,
            final_codes=FINAL_CODES, directives=settings.directives,
        )  # fmt: skip
    return slurm.render(job)


def _submit_first(path: Path, dry_run: bool) -> tuple[int, str]:
    """Submit a script; its exit code, and the number of the job, which `sbatch --parsable` prints before any `;`."""
    command = ["sbatch", "--parsable", str(path)]
    print(shlex.join(command), flush=True)
    if dry_run:
        return 0, "NUMBER"
    done = _start(command, stdout=subprocess.PIPE)
    print(done.stdout, end="", flush=True)
    return shell_exit_code(done.returncode), done.stdout.strip().partition(";")[0]


_GPU_DIRECTIVE = re.compile(r"(gpus|gpus-per-node|gres)=(?:gpu:)?(?:[A-Za-z][\w.-]*:)?(\d+)")


def _check_directives(options: JobOptions, directives: tuple[str, ...], prepared: bool) -> None:
    """Raise ConfigError when --sbatch asks for fewer GPUs than there are ranks, or for those of all nodes at once."""
    if options.request.config.runtime.device == "cpu":
        return
    for directive in directives:
        if not (found := _GPU_DIRECTIVE.fullmatch(directive)):
            continue
        ranks = options.nodes * options.slots if found[1] == "gpus" else options.slots
        if found[1] == "gpus" and prepared:
            expected = "gpus-per-node=N: the job of one node cannot have the GPUs of all"
        elif int(found[2]) < ranks:
            expected = f"a GPU for each of {ranks} ranks, or fewer --slots"
        else:
            continue
        raise ConfigError("--sbatch", expected=expected, got=directive)


def apply_kubernetes(options: JobOptions, pods: PodOptions, port: int, prepare: JobOptions | None = None) -> int:
    """Make the objects and give them to kubectl; returns its exit code.

    With `prepare` only that job is made, because Kubernetes starts no job after another: what to do next is printed.
    Raises ConfigError for pods with fewer GPUs than ranks.
    """
    if not pods.image:
        raise ConfigError("--kubernetes", expected="--image, a container image with kdscale in it", got="none")
    device = options.request.config.runtime.device
    if (pods.gpus and pods.gpus < options.slots and device != "cpu") or (device == "cuda" and not pods.gpus):
        raise ConfigError("--gpus", expected=f"{options.slots} a pod, one for each of --slots", got=str(pods.gpus))
    job = _kubernetes_job(prepare or options, pods, port, "-prepare" if prepare else "")
    objects = kube.pytorch_job(job) if pods.pytorchjob and not prepare else kube.indexed_job(job)
    manifest = json.dumps(kube.as_list(objects), indent=2)
    if options.dry_run:
        print(manifest)
    code = _execute(["kubectl", "apply", "-f", "-"], {}, options.dry_run, stdin=manifest)
    if prepare and code == 0:
        wait = ["kubectl", "wait", "--for=condition=complete", "--timeout=-1s", "-n", pods.namespace, f"job/{job.name}"]
        print(f"# then, and when it has ended the same command without --prepare:\n{shlex.join(wait)}")
    return code


def _kubernetes_job(options: JobOptions, pods: PodOptions, port: int, suffix: str) -> kube.KubernetesJob:
    name = re.sub(r"[^a-z0-9-]+", "-", f"kdscale-{options.request.config.name}".lower())[: 40 - len(suffix)].strip("-")
    with launcher_errors("--kubernetes"):
        return kube.KubernetesJob(
            name=name + suffix, nodes=options.nodes, slots=options.slots, image=pods.image,
            command=options.rank_command, log_dir=str(options.request.logs / "ranks"), cwd=str(Path.cwd()),
            python=options.python, namespace=pods.namespace, env=options.environment(), secrets=pods.secrets,
            volumes=dict(_volume(text) for text in pods.volumes), gpus=pods.gpus, port=port,
            max_restarts=options.max_restarts, grace=pods.grace, final_codes=FINAL_CODES,
        )  # fmt: skip


def _volume(text: str) -> tuple[str, str]:
    """Claim and mount path of CLAIM:/PATH."""
    claim, colon, path = text.partition(":")
    if not colon or not claim or not path.startswith("/"):
        raise ConfigError("--volume", expected="CLAIM:/PATH", got=text)
    return claim, path


def run_torchrun(options: JobOptions, endpoint: str, grace: int) -> int:
    """Run this node's ranks under torchrun; the nodes meet at `endpoint` (host:port). Returns the exit code.

    After SIGTERM it gives the ranks `grace` seconds.
    """
    with launcher_errors():
        command = torchrun_deepspeed.torchrun(
            options.python, RANK_MODULE, options.request.arguments, nodes=options.nodes, slots=options.slots,
            endpoint=endpoint, job_id=f"kdscale-{options.request.config.name}", max_restarts=options.max_restarts,
        )  # fmt: skip
    environment = {**rank_defaults(), **torchrun_deepspeed.torchrun_environment(grace)}
    return _execute(command, environment, options.dry_run)


def _start(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. Raises MissingProgramError when it cannot be started."""
    try:
        return subprocess.run(list(command), text=True, check=False, **options)
    except OSError as error:
        raise MissingProgramError(f"cannot start {command[0]}", got=str(error.strerror)) from error


def _execute(
    command: Sequence[str], environment: Mapping[str, str], dry_run: bool, stdin: str | None = None, tries: int = 1
) -> int:
    """Print the command with its variables, and run it up to `tries` times. Returns its exit code.

    Raises MissingProgramError when it cannot be started.
    """
    shown = shlex.join([*(["env", *masked_lines(environment)] if environment else []), *command])
    print(without_credentials(shown), flush=True)
    if dry_run:
        return 0
    code = 0
    for number in range(tries):
        code = shell_exit_code(_start(command, env={**os.environ, **environment}, input=stdin).returncode)
        if code == 0 or code in FINAL_CODES:
            break
        if number + 1 < tries:
            print(f"broke with exit code {code}: restart {number + 1} of {tries - 1}", file=sys.stderr, flush=True)
    return code
