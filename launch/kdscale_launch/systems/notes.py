"""Notes between a job and whoever submitted it: a folder on storage that both see.

A file `stop` asks the job to save and leave, where no signal reaches it; it is not started again. Each node leaves its
exit code in `exit-N`, which outlives what the job system remembers.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kdscale_launch.job import STOPPED_EXIT_CODE

STOP = "stop"
_EXIT = re.compile(r"exit-([0-9]{1,6})")
_CODE = re.compile(r"[0-9]{1,3}")
_POLL_SECONDS = 1.0


def ask_to_stop(folder: Path) -> None:
    """Ask the job to save and leave."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).touch()


def is_asked_to_stop(folder: Path) -> bool:
    """Whether somebody asked."""
    return (folder / STOP).exists()


def watch_for_stop(folder: Path) -> None:
    """Send this process SIGTERM once somebody asks it to stop; a thread that ends with the process."""

    def watch() -> None:
        # only a process that has a handler for SIGTERM saves on it
        while not (is_asked_to_stop(folder) and callable(signal.getsignal(signal.SIGTERM))):
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stop file", daemon=True).start()


def forget_exit_code(folder: Path, node: int) -> None:
    """Remove what an earlier start of this node left."""
    (folder / f"exit-{node}").unlink(missing_ok=True)


def leave_exit_code(folder: Path, node: int, code: int) -> None:
    """Write this node's exit code; the file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".exit-{node}"
    draft.write_text(f"{code}\n", encoding="ascii")
    draft.replace(folder / f"exit-{node}")


def read_exit_codes(folder: Path) -> dict[int, int]:
    """The exit codes that nodes have left, by node. Files that hold none are passed over."""
    codes: dict[int, int] = {}
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            if name := _EXIT.fullmatch(path.name):
                with suppress(OSError), path.open("rb") as stream:
                    text = stream.read(16).decode("ascii", "replace").strip()
                    if _CODE.fullmatch(text) and int(text) < 256:
                        codes[int(name[1])] = int(text)
    return codes


def job_exit_code(codes: Mapping[int, int], final_codes: frozenset[int]) -> int | None:
    """One code for the whole job, or None where no node left any.

    The code of a node that another try would not mend tells most; the others leave because they lost it.
    """
    failed = sorted(code for code in codes.values() if code not in (0, STOPPED_EXIT_CODE))
    final = [code for code in failed if code in final_codes]
    if final or failed:
        return (final or failed)[0]
    return max(codes.values(), default=None)  # 75 when any node stopped before its end
