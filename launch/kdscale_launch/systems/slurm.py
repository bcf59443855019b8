"""A Slurm batch script that requeues itself after preemption, a time limit or a broken node, until the job is done."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from kdscale_launch.job import STOPPED_EXIT_CODE, LaunchError

_DIRECTIVE = re.compile(r"^[a-z][a-z-]*(=[^\n]*)?$")
# Each task takes its rank from Slurm; the command follows as arguments, which no shell parses again.
_TASK = 'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"; exec "$@"'


@dataclass(frozen=True)
class SlurmJob:
    """What the script runs. `directives` are more sbatch options without dashes, such as `partition=gpu`."""

    name: str
    nodes: int
    slots: int
    command: tuple[str, ...]
    cwd: str
    output: str
    check: tuple[str, ...] = ()  # run once per rank first; when it fails, the job does not start
    env: Mapping[str, str] = field(default_factory=dict)
    time_limit: str = ""
    warn_seconds: int = 300  # SIGTERM this long before the time limit
    max_restarts: int = 3  # after a broken rank or node; preemption does not count
    final_codes: frozenset[int] = frozenset()
    directives: tuple[str, ...] = ()


def render(job: SlurmJob) -> str:
    """The script. Raises LaunchError for a directive that is not an sbatch option."""
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
        check=_srun(job.check) if job.check else ":", step=_srun(job.command), stopped=STOPPED_EXIT_CODE,
        restarts=job.max_restarts, final=final,
    )  # fmt: skip


def _srun(command: tuple[str, ...]) -> str:
    """A job step that runs the command once per rank."""
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
run() {{  # in the background, so that the trap runs at once; wait again when a signal ends the wait early
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
    {final}) echo "another attempt would end with the same error: not requeued" ;;
    *) if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
           echo "broke with exit code $code: requeued"
           scontrol requeue "$SLURM_JOB_ID"
       fi ;;
esac
exit $code
"""
