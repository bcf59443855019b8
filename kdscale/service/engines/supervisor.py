"""`python -m kdscale.service.engines.supervisor WORK`: runs one attempt, and writes down how it ended.

It leaves the service that started it (a session of its own, no pipe to it), so that the service may end, be killed and
start again while the run goes on. Whoever holds WORK/lock is the supervisor of this attempt, and an attempt that has a
started.json is never begun again. The run dies with its supervisor. Little more than the standard library: it
starts in a tenth of a second and takes a few megabytes for days.

WORK/  request.json (what to run)  lock  started.json  stop.json (written by whoever wants it to stop)  exit.json
  output.log (what the run prints)  supervisor.log (what this program prints)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from kdscale.errors import KdscaleError, RunFolderError
from kdscale.files import read_json, read_own_json, write_json
from kdscale.runtime.locks import LOOK_SECONDS, try_lock
from kdscale.service.engines.marks import MARK, end_marked
from kdscale_launch.job import STOPPED_EXIT_CODE, CannotStart, shell_exit_code
from kdscale_launch.processes import Process, start_process

REQUEST, LOCK, STARTED, STOP, EXIT = "request.json", "lock", "started.json", "stop.json", "exit.json"
OUTPUT, OWN_LOG = "output.log", "supervisor.log"
_POLL_SECONDS = 0.1
_CANNOT_START = 127  # as a shell has it
_WRITE_AGAIN_SECONDS, _WRITE_TRIES = 5.0, 720  # an hour for somebody to free some space


class _Stop:
    """The signals of the run: SIGTERM once it is asked to stop, SIGKILL when its time is up."""

    def __init__(self, work: Path):
        self._file, self._read, self._deadline, self._asked = work / STOP, float("inf"), float("inf"), False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # somebody ends all processes of the service: the run saves, and as long as it takes is not for us to say
        self._asked = True

    def asked(self) -> bool:
        """Whether the run should stop; a later file may shorten the time it has."""
        if (wanted := read_own_json(self._file, is_stop)) is not None:
            self._asked = True
            if wanted["deadline"] < self._read:  # from here on by a clock that nobody sets
                self._read = wanted["deadline"]
                self._deadline = time.monotonic() + wanted["deadline"] - time.time()
        return self._asked

    @property
    def is_late(self) -> bool:
        """Whether the run has had its time to save."""
        return time.monotonic() > self._deadline


def is_stop(value: Any) -> bool:
    """Whether a JSON value is what stop.json holds: until when the run may save, in seconds of Unix time."""
    return isinstance(value, dict) and isinstance(value.get("deadline"), int | float)


def is_request(value: Any) -> bool:
    """Whether a JSON value is what request.json holds."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("command"), list)
        and all(isinstance(part, str) for part in (*value["command"], value.get("folder"), value.get("mark")))
        and len(value["command"]) > 0
    )


def supervise(work: Path, request: Mapping[str, Any]) -> None:
    """Run the command to its end and leave exit.json. The caller holds the lock and has written started.json."""
    stop = _Stop(work)
    with (work / OUTPUT).open("ab", buffering=0) as output:  # all is there before exit.json is
        if stop.asked():  # before it began: there is nothing to lose
            _write(work / EXIT, {"exit_code": STOPPED_EXIT_CODE, "ended": time.time()})
            return
        environment = {**os.environ, MARK: request["mark"]}
        try:
            process = start_process(request["command"], environment, request["folder"], output)
        except CannotStart as error:
            output.write(f"error: {error}\n".encode())
            _write(work / EXIT, {"exit_code": _CANNOT_START, "ended": time.time()})
            return
        code = _wait(process, stop)
    end_marked(request["mark"])  # what it left running would meet the next attempt in the same folder
    # while a run has something to lose it catches the signal: one that dies of it was still being loaded
    left = STOPPED_EXIT_CODE if code == -signal.SIGTERM else shell_exit_code(code)
    _write(work / EXIT, {"exit_code": left, "ended": time.time()})


def _wait(process: Process, stop: _Stop) -> int:
    """The return code of the run; it is told to stop once, and killed when it does not in time."""
    told = False
    while (code := process.poll()) is None:
        if stop.asked():
            if not told:
                os.killpg(process.pid, signal.SIGTERM)  # not reaped yet, so the number is still this process's
                told = True
            if stop.is_late:
                os.killpg(process.pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return code


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file that must be there: a disk that is full now may not be in a minute."""
    for last in range(_WRITE_TRIES):
        try:
            write_json(path, value)
        except RunFolderError as error:
            print(error, file=sys.stderr, flush=True)
            if last == _WRITE_TRIES - 1:
                raise
            time.sleep(_WRITE_AGAIN_SECONDS)
        else:
            return


def main(work: Path) -> int:
    """Take the attempt, leave the caller and supervise; 0 also where the attempt has its supervisor, or had one."""
    lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not try_lock(lock, LOOK_SECONDS) or (work / STARTED).exists() or (work / EXIT).exists():
        return 0
    request = read_json(work / REQUEST)
    if not is_request(request):
        raise RunFolderError(f"{work / REQUEST} is damaged", expected="a command, its folder and its mark")
    ready, begun = os.pipe()
    if os.fork():  # the caller waits for this process; the other one has the lock too
        os.close(begun)
        return 0 if os.read(ready, 1) else 1
    os.close(ready)
    os.setsid()
    try:
        # before the run begins: an attempt may be lost, but never run twice
        write_json(work / STARTED, {"supervisor": os.getpid(), "started": time.time()})
        os.write(begun, b"1")
        os.close(begun)
        supervise(work, request)
    except KdscaleError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        code = main(Path(sys.argv[1]))
    except KdscaleError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
