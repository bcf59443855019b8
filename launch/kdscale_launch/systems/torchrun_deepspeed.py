"""Command lines of launchers that start the ranks themselves: torchrun and DeepSpeed's."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from kdscale_launch.environment import check_variables
from kdscale_launch.hosts.hostfile import check_host_name
from kdscale_launch.job import LaunchError


def torchrun_environment(grace: int) -> dict[str, str]:
    """What torchrun reads. After SIGTERM it kills the ranks in `grace` seconds, where its own default is 30.

    Without the first one, torch 2.13's workers share the rendezvous store and, when restarted, hang or fail to
    reconnect. Versions that do not know the second one keep to 30 seconds.
    """
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace)}


def torchrun(
    python: str, module: str, arguments: tuple[str, ...], *, nodes: int, slots: int, endpoint: str, job_id: str,
    max_restarts: int,
) -> list[str]:  # fmt: skip
    """The command for every node: the nodes meet at `endpoint` (host:port), and all restart when a rank breaks.

    Raises LaunchError for an endpoint that is not a host and a port.
    """
    check_host_name("--master-addr", endpoint.rpartition(":")[0])
    return [
        python, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={slots}", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job_id}", f"--max-restarts={max_restarts}", "--module", module,
        *arguments,
    ]  # fmt: skip


def deepspeed(
    python: str,
    module: str,
    arguments: tuple[str, ...],
    *,
    hostfile: str,
    master_addr: str,
    master_port: int,
    cwd: str = "/",
) -> list[str]:
    """The command of DeepSpeed's runner over pdsh, to be run once.

    `--no_local_rank`: our ranks read the environment only. `--no_ssh_check`: its check ignores our ssh options.
    Raises LaunchError for what a shell would change, `cwd` too: the runner passes them through one unquoted.
    """
    check_host_name("--master-addr", master_addr)
    for argument in (python, hostfile, cwd, *arguments):
        if shlex.quote(argument) != argument:
            raise LaunchError(f"DeepSpeed's launcher cannot pass the argument {argument!r}; use --launcher ssh")
    return [
        python, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--launcher=pdsh", "--force_multi",
        "--no_ssh_check", "--no_local_rank", f"--master_addr={master_addr}", f"--master_port={master_port}",
        "--module", module, *arguments,
    ]  # fmt: skip


def deepspeed_environment(ssh_options: str, env_file: str, dead_after: float) -> dict[str, str]:
    """What DeepSpeed's runner and pdsh read: keep-alives that end a dead link, and the file of forwarded variables."""
    alive = f"-o ServerAliveInterval={max(1, int(dead_after / 3))} -o ServerAliveCountMax=3"
    return {"PDSH_SSH_ARGS_APPEND": f"{alive} {ssh_options}".strip(), "DS_ENV_FILE": env_file}


def env_file(environment: Mapping[str, str]) -> str:
    """The text of `.deepspeed_env`: NAME=value lines, which DeepSpeed pastes into a remote shell's `export`.

    Raises LaunchError for a name or a value that would end the line or the command.
    """
    check_variables(environment)
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in environment.items())
