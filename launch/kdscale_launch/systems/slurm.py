"""A Slurm batch script that requeues itself after preemption, a time limit or a broken node, until the job is done."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from kdscale_launch.environment import check_text, check_variables
from kdscale_launch.job import STOPPED_EXIT_CODE, LaunchError

_DIRECTIVE = re.compile(r"[a-z][a-z-]*(=.*)?")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:;=@%/+-]+")
_TIME = re.compile(r"[0-9]+(-[0-9]+(:[0-9]+){0,2}|(:[0-9]+){0,2})|UNLIMITED|INFINITE", re.IGNORECASE)
# Runs a command and passes signals on: in the background, so that the trap runs at once; when a signal ends the wait
# early, it waits again.
_RUN = """signalled= step=
trap 'signalled=1; pass_on' TERM INT
run() {
    "$@" &
    step=$!
    while :; do
        signalled=
        wait "$step"
        code=$?
        [ -z "$signalled" ] && return "$code"
    done
}"""
# Each task takes its rank from Slurm; the command follows as arguments, which no shell parses again. When a task fails,
# srun kills the others and reports that they were killed. So a rank that was stopped is none that failed (the others
# are about to leave too), a failed one gives those that fail alike a second, and rank 0, which is on the script's host,
# leaves its code in a file. A task that begins when the job is already to stop does not start its rank.
_TASK = f"""export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"
pass_on() {{ kill -TERM "$step" 2>/dev/null; }}
{_RUN}
if [ "$RANK" = 0 ] && [ -e "${{KDSCALE_RANK_0%/*}}/stop" ]; then
    echo {STOPPED_EXIT_CODE} > "$KDSCALE_RANK_0"
    exit 137
fi
run "$@"
code=$?
[ "$RANK" != 0 ] || echo "$code" > "$KDSCALE_RANK_0"
[ "$code" != {STOPPED_EXIT_CODE} ] || exit 0
[ "$code" = 0 ] || sleep 1
exit "$code"
"""


@dataclass(frozen=True)
class SlurmJob:
    """What the script runs. `directives` are more sbatch options without dashes, such as `partition=gpu`.

    `output` is the file for what the job prints, with Slurm's own %-patterns. `notes` is a folder in which the script
    leaves its exit code, and which can ask it to stop (kdscale_launch.systems.notes). Raises LaunchError for a time
    limit or a directive that sbatch would not take, and for control characters anywhere.
    """

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
    notes: str = ""

    def __post_init__(self) -> None:
        for directive in self.directives:
            if not _DIRECTIVE.fullmatch(directive):
                raise LaunchError(f"not an sbatch option: {directive!r}; expected e.g. partition=gpu")
        if self.time_limit and not _TIME.fullmatch(self.time_limit):
            raise LaunchError(f"--time: expected D-HH:MM:SS, got {self.time_limit[:200]!r}")
        if "\\" in self.output:
            raise LaunchError(f"run_dir: Slurm cannot write its output under {self.output!r}, because of the backslash")
        texts = (self.name, self.cwd, self.output, self.notes, *self.command, *self.check, *self.directives)
        check_text("the Slurm script", *texts)
        check_variables(self.env)


def render(job: SlurmJob) -> str:
    """The script: every text that comes from outside is quoted."""
    options = [
        f"job-name={job.name}", f"nodes={job.nodes}", f"ntasks-per-node={job.slots}", "requeue", "open-mode=append",
        f"output={job.output}", f"signal=B:TERM@{job.warn_seconds}",
        *([f"time={job.time_limit}"] if job.time_limit else []), *job.directives,
    ]  # fmt: skip
    header = "\n".join(f"#SBATCH --{_quote_option(option)}" for option in options)
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.env.items())
    final = "|".join(str(code) for code in sorted(job.final_codes)) or "none"
    return _SCRIPT.format(
        header=header, cwd=shlex.quote(job.cwd), exports=exports, world=job.nodes * job.slots, slots=job.slots,
        check=_srun(job.check) if job.check else ":", step=_srun(job.command), stopped=STOPPED_EXIT_CODE,
        restarts=job.max_restarts, final=final, run=_RUN, notes=shlex.quote(job.notes),
    )  # fmt: skip


def _quote_option(option: str) -> str:
    """An option as sbatch reads it back: in double quotes, a backslash takes the next character as it is."""
    if _PLAIN.fullmatch(option):
        return option
    name, equals, value = option.partition("=")
    escaped = value.replace("\\", r"\\").replace('"', r"\"")
    return f'{name}{equals}"{escaped}"'


def file_pattern(path: str) -> str:
    """A path as the beginning of an output pattern of Slurm's, which would replace %j and the like in it."""
    return path.replace("%", "%%")


def _srun(command: tuple[str, ...]) -> str:
    """A job step that runs the command once per rank."""
    return f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(_TASK)} rank {shlex.join(command)}"


_SCRIPT = """#!/bin/bash
{header}
set -u
notes={notes}
leave() {{
    [ -z "$notes" ] || {{ echo "$1" > "$notes/.exit-0" && mv "$notes/.exit-0" "$notes/exit-0"; }}
    exit "$1"
}}
asked_to_stop() {{ [ -n "$notes" ] && [ -e "$notes/stop" ]; }}
[ -z "$notes" ] || rm -f "$notes/exit-0"
! asked_to_stop || leave {stopped}
cd {cwd} || leave 1
{exports}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT WORLD_SIZE={world} LOCAL_WORLD_SIZE={slots}

marks=$(mktemp -d) || leave 1
trap 'rm -rf "$marks"' EXIT
export KDSCALE_RANK_0="$marks/code"

# srun itself must not get the signal: it would kill its tasks at once. scancel sends it to the tasks.
pass_on() {{
    touch "$marks/stop"
    scancel --signal=TERM "$SLURM_JOB_ID"
}}
{run}

ranks() {{
    [ ! -e "$marks/stop" ] || return {stopped}
    rm -f "$KDSCALE_RANK_0"
    run "$@"
    code=$?
    if [ "$code" = 0 ] || [ "$code" -gt 128 ]; then  # stopped, or killed because another one failed
        own=$(cat "$KDSCALE_RANK_0" 2>/dev/null)
        [ "${{own:-0}}" = 0 ] || code=$own
    fi
    return "$code"
}}

ranks {check} || leave $?
ranks {step}
code=$?
case $code in
    0) leave 0 ;;
    {stopped}) if asked_to_stop; then
           echo "stopped with everything saved, as somebody asked: not requeued"
       else
           echo "stopped with everything saved: requeued"
           scontrol requeue "$SLURM_JOB_ID"
       fi ;;
    {final}) echo "another attempt would end with the same error: not requeued" ;;
    *) if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
           echo "broke with exit code $code: requeued"
           scontrol requeue "$SLURM_JOB_ID"
       fi ;;
esac
leave $code
"""
