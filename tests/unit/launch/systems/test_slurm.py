"""The Slurm script, executed with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdscale_launch import LaunchError
from kdscale_launch.systems import slurm
from kdscale_launch.systems.notes import ask_to_stop, read_exit_codes

SCONTROL = '#!/bin/sh\n[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >> requeued\n'
# To the processes of all tasks, as Slurm 22.05 does it (tried with a real one).
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 12345" ] || exit 1
for task in $(cat tasks); do kill -TERM -- "-$task"; done
"""
# Kills all tasks when one fails (--kill-on-bad-exit), and when it gets a signal itself: the real one forwards none.
SRUN = """#!/bin/bash
shift
pids=()
trap 'for pid in "${pids[@]}"; do kill -KILL -- "-$pid"; done' TERM
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=0 setsid "$@" & pids+=($!); done
echo "${pids[@]}" > tasks
code=0
while [ ${#pids[@]} -gt 0 ]; do
    for index in "${!pids[@]}"; do
        kill -0 "${pids[index]}" 2>/dev/null && continue
        wait "${pids[index]}"; this=$?
        unset "pids[index]"
        [ "$this" -gt "$code" ] && code=$this
        [ "$this" = 0 ] || for other in "${pids[@]}"; do kill -KILL -- "-$other" 2>/dev/null; done
    done
    sleep 0.02
done
exit $code
"""


@pytest.fixture
def slurm_script(tmp_path: Path):
    """Runs a rendered script for two ranks of `code`; gives the process."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def start(code: str, restarts_so_far: int = 0, **settings) -> subprocess.Popen[str]:
        (tmp_path / "rank.py").write_text(code)
        command = (sys.executable, "-S", str(tmp_path / "rank.py"), "a b", "$HOME")
        defaults = {"name": "kdscale-x", "command": command, "output": "log"}
        job = slurm.SlurmJob(nodes=2, slots=1, cwd=str(tmp_path), **{**defaults, **settings})
        script = tmp_path / "job.sbatch"
        script.write_text(slurm.render(job))
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "12345",
                       "SLURM_RESTART_COUNT": str(restarts_so_far)}  # fmt: skip
        return subprocess.Popen(["bash", str(script)], env=environment, text=True, stdout=subprocess.PIPE)

    return start


def test_slurm_ranks_get_torchs_environment_and_untouched_arguments(slurm_script, tmp_path):
    code = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HF_HOME")
json.dump([os.environ[n] for n in names] + sys.argv[1:], open("rank-" + os.environ["RANK"], "w"))
"""
    process = slurm_script(code, env={"HF_HOME": "/a b"})
    process.communicate(timeout=30)
    assert process.returncode == 0
    seen = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert seen == [[str(rank), "0", "2", "1", "n1", "22345", "/a b", "a b", "$HOME"] for rank in range(2)]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("exit_code", "so_far", "requeued"), [(75, 9, True), (1, 0, True), (1, 2, False), (4, 0, False), (137, 1, True)]
)
def test_slurm_requeues_what_another_try_can_mend(slurm_script, tmp_path, exit_code, so_far, requeued):
    process = slurm_script(f"import sys; sys.exit({exit_code})", so_far, max_restarts=2, final_codes=frozenset({2, 4}))
    process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 12345\n"


def test_slurms_warning_reaches_the_ranks_and_requeues(slurm_script, tmp_path):
    code = """
import os, signal, sys, time
rank = os.environ["RANK"]
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == "0":
        time.sleep(0.5)  # it has more to do than the other one
        open("saved", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open("ready-" + rank, "w").close()
while True: time.sleep(0.05)
"""
    process = slurm_script(code)
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "requeued" in said
    assert (tmp_path / "requeued").exists()
    assert (tmp_path / "saved").exists()


def test_a_job_that_is_stopped_while_its_check_runs_starts_no_rank(slurm_script, tmp_path):
    check = (sys.executable, "-S", "-c", "import time; open('checks', 'w'); time.sleep(60)")
    process = slurm_script("open('started', 'w')", check=check)
    deadline = time.monotonic() + 20
    while not (tmp_path / "checks").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not (tmp_path / "started").exists()


def test_a_failed_check_keeps_the_job_from_starting(slurm_script, tmp_path):
    check = (sys.executable, "-S", "-c", "import sys; sys.exit(3)")
    process = slurm_script("open('started', 'w')", check=check)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert not (tmp_path / "started").exists()


def test_the_slurm_header():
    job = slurm.SlurmJob("kdscale-x", 4, 8, ("python",), "/w", "/o", time_limit="1-00:00:00", warn_seconds=120,
                         directives=("partition=gpu", "exclusive"))  # fmt: skip
    lines = slurm.render(job).splitlines()
    for option in ("nodes=4", "ntasks-per-node=8", "requeue", "signal=B:TERM@120", "time=1-00:00:00", "exclusive"):
        assert f"#SBATCH --{option}" in lines


_NASTY = "a b;touch injected $(touch injected) `touch injected` 'q' \"d\" # %j -"


def test_nothing_of_a_text_in_the_script_runs(slurm_script, tmp_path):
    """Each text is one that a shell or sbatch would act on, if it were not quoted."""
    code = (
        "import json, os, sys; e = os.environ; json.dump([e['HF_HOME'], *sys.argv[1:]], open('seen-' + e['RANK'], 'w'))"
    )
    command = (sys.executable, "-S", "-c", code, _NASTY)
    process = slurm_script("", name=_NASTY, command=command, check=command, output=_NASTY, env={"HF_HOME": _NASTY},
                           directives=(f"comment={_NASTY}",))  # fmt: skip
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads((tmp_path / "seen-1").read_text()) == [_NASTY, _NASTY]
    assert not list(tmp_path.rglob("injected"))


def test_sbatch_reads_every_option_back_as_it_was_given():
    job = slurm.SlurmJob(
        "x", 1, 1, ("p",), "/", slurm.file_pattern("/a b'\"%j/c") + "/%j.out", directives=(r"comment=\" -",)
    )
    header = [line for line in slurm.render(job).splitlines() if line.startswith("#SBATCH ")]
    assert [_sbatch_words(line.removeprefix("#SBATCH ")) for line in header][-4:] == [
        ["--open-mode=append"],
        ["--output=/a b'\"%%j/c/%j.out"],
        ["--signal=B:TERM@300"],
        [r"--comment=\" -"],
    ]


def _sbatch_words(line: str) -> list[str]:
    """The words of an #SBATCH line, by Slurm's rules: quotes group, a backslash takes what follows as it is."""
    words, word, quote, escaped = [], "", "", False
    for character in line:
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        elif not quote and character.isspace():
            words, word = [*words, word], ""
        else:
            word += character
    return [*words, word]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"time_limit": "1:00\ntouch injected"}, "--time: expected D-HH:MM:SS"),
        ({"time_limit": "1 --wrap=x"}, "--time: expected D-HH:MM:SS"),
        ({"directives": ("a\nreboot",)}, "not an sbatch option"),
        ({"directives": ("comment=a\n",)}, "not an sbatch option"),
        ({"directives": ("comment=a\rb",)}, "without line breaks"),
        ({"output": "/run\ntouch injected"}, "without line breaks"),
        ({"output": "/run\\x"}, "backslash"),
        ({"cwd": "/a\x1b[2J"}, "without line breaks"),
        ({"command": ("p", "a\nb")}, "without line breaks"),
        ({"check": ("p", "a\u2028b")}, "without line breaks"),
        ({"env": {"HF_X=1; touch injected;": "1"}}, "letters, digits and _"),
        ({"env": {"HF_X": "1\ntouch injected"}}, "environment variable HF_X"),
    ],
)
def test_texts_that_no_script_can_hold_are_refused(changed, message):
    settings = {"name": "x", "nodes": 1, "slots": 1, "command": ("p",), "cwd": "/", "output": "/o", **changed}
    with pytest.raises(LaunchError, match=message):
        slurm.SlurmJob(**settings)


@pytest.mark.parametrize(("exit_code", "asked", "requeued"), [(75, False, True), (75, True, False), (6, False, False)])
def test_notes_hold_the_exit_code_and_can_keep_a_job_from_going_on(slurm_script, tmp_path, exit_code, asked, requeued):
    notes = tmp_path / "its notes"
    notes.mkdir()
    ask = f"open({str(notes / 'stop')!r}, 'w').close(); " if asked else ""
    process = slurm_script(f"import sys; {ask}sys.exit({exit_code})", max_restarts=0, notes=str(notes))
    process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert read_exit_codes(notes) == {0: exit_code}
    assert (tmp_path / "requeued").exists() == requeued


def test_a_job_that_was_asked_to_stop_before_it_began_starts_no_rank(slurm_script, tmp_path):
    ask_to_stop(tmp_path / "notes")
    process = slurm_script("open('started', 'w')", notes=str(tmp_path / "notes"))
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert read_exit_codes(tmp_path / "notes") == {0: 75}
    assert not (tmp_path / "started").exists()
