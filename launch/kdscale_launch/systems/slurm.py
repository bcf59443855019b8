"""A Slurm batch script: requeued after preemption, a time limit or a broken node, until the job is done."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from kdscale_launch.job import STOPPED_EXIT_CODE, LaunchError

_DIRECTIVE = re.compile(r"^[a-z][a-z-]*(=[^\n]*)?$")


# The rank's variables come from Slurm inside each task; the command itself follows as arguments, never re-parsed.
_TASK = 'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"; exec "$@"'


@dataclass(frozen=True)
class SlurmJob:
    """`directives` are further sbatch options without dashes, such as `partition=gpu` or `gpus-per-node=8`."""

    name: str
    nodes: int
    slots: int
    command: tuple[str, ...]
    cwd: str
    output: str
    check: tuple[str, ...] = ()  # run once a rank before the job; the job is not started when it fails
    env: Mapping[str, str] = field(default_factory=dict)
    time_limit: str = ""
    warn_seconds: int = 300  # SIGTERM this long before the time limit
    max_restarts: int = 3  # for ranks and nodes that break; preemption is not counted
    final_codes: frozenset[int] = frozenset()
    directives: tuple[str, ...] = ()


def render(job: SlurmJob) -> str:
    """The script. Raises LaunchError for a directive that is not one."""
    for directive in job.directives:
        if not _DIRECTIVE.match(directive):
            raise LaunchError(f"not an sbatch option: {directive!r}; expected e.g. partition=gpu")
    options = [
        f"job-name={job.name}", f"nodes={job.nodes}", f"ntasks-per-node={job.slots}", "requeue", "open-mode=append",
        f"output={job.output}", f"signal=B:TERM@{job.warn_seconds}",
        *([f"time={job.time_limit}"] if job.time_limit else []), *job.directives,
    ]  # fmt: skip
    header = "\n".join(f"#SBATCH --{option}" for option in options)
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.env.items())
    final = "|".join(str(code) for code in sorted(job.final_codes)) or "none"
    return _SCRIPT.format(
        header=header, cwd=shlex.quote(job.cwd), exports=exports, world=job.nodes * job.slots, slots=job.slots,
        check=_step(job.check) if job.check else ":", step=_step(job.command), stopped=STOPPED_EXIT_CODE,
        restarts=job.max_restarts, final=final,
    )  # fmt: skip


def _step(command: tuple[str, ...]) -> str:
    return f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(_TASK)} rank {shlex.join(command)}"


_SCRIPT = """#!/bin/bash
{header}
set -u
cd {cwd} || exit 1
{exports}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE={world} LOCAL_WORLD_SIZE={slots}

signalled=
trap 'signalled=1; kill -TERM "$step" 2>/dev/null' TERM INT
run() {{  # a step in the background, so that the trap runs at once; wait again when a signal cut the wait short
    "$@" &
    step=$!
    while :; do
        signalled=
        wait "$step"
        code=$?
        [ -z "$signalled" ] && return "$code"
    done
}}

run {check} || exit $?
run {step}
code=$?
case $code in
    0) exit 0 ;;
    {stopped}) echo "stopped with everything saved: requeued"; scontrol requeue "$SLURM_JOB_ID" ;;
    {final}) echo "an error that another try would not change" ;;
    *) if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
           echo "broke with exit code $code: requeued"
           scontrol requeue "$SLURM_JOB_ID"
       fi ;;
esac
exit $code
"""
