"""All ranks on this machine. None outlives the launcher, and none waits for a rank that is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from kdscale_launch.job import JobSpec, LaunchError, RankFailed

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1
_TAIL_BYTES = 4000


def run_local(spec: JobSpec) -> int:
    """Run the job to its end and return 0, or the exit code that all ranks share after SIGINT or SIGTERM.

    SIGINT and SIGTERM are passed on to every rank, which may then take `grace_seconds` to save; a second one kills.
    Raises RankFailed for the first rank that fails, after the others were ended, and LaunchError when the command
    cannot be started. Must be called from the main thread (signal handlers, and the kernel's parent-death signal).
    """
    port = free_port()
    with ExitStack() as stack:
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_end_all, ranks, 0.0)  # whatever happens, nothing is left running
        received = stack.enter_context(_forward_signals(ranks))
        for rank in range(spec.processes):
            ranks.append(_start(spec, rank, port, stack))
        return _wait(spec, ranks, received)


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(spec: JobSpec, rank: int, port: int) -> dict[str, str]:
    """The environment that torch.distributed's env:// and DeepSpeed read."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        **os.environ,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", loopback),
        **spec.env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(spec.processes),
        "LOCAL_WORLD_SIZE": str(spec.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def log_file(spec: JobSpec, rank: int) -> Path:
    return spec.log_dir / f"rank-{rank}.log"


def _start(spec: JobSpec, rank: int, port: int, stack: ExitStack) -> subprocess.Popen[bytes]:
    output: Any = None
    if rank > 0:
        spec.log_dir.mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(log_file(spec, rank).open("wb"))
    command = list(spec.command)
    if not sys.platform.startswith("linux"):
        command = [sys.executable, "-m", "kdscale_launch.watch", str(os.getpid()), *command]
    try:
        return subprocess.Popen(
            command,
            env=rank_environment(spec, rank, port),
            cwd=spec.cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            preexec_fn=_die_with(os.getpid()) if sys.platform.startswith("linux") else None,
        )
    except OSError as error:
        raise LaunchError(f"cannot start {spec.command[0]!r}: {error.strerror}") from error


def _die_with(parent: int) -> Callable[[], None]:
    """Ask the kernel to kill this child when its parent dies, however that happens.

    SIGKILL rather than SIGTERM: a rank that lived on to save would meet the next run in the same folder, and every file
    is safe to leave at any instant.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: little is safe after it

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return ask


@contextmanager
def _forward_signals(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on; the list holds those that came."""
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        _signal_all(ranks, signum if len(received) == 1 else signal.SIGKILL)

    previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _wait(spec: JobSpec, ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> int:
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code not in (None, 0)), None)
        if received:
            deadline = min(deadline, time.monotonic() + spec.grace_seconds)
            if all(code is not None for code in codes):
                return _stopped_code(spec, codes, received[0])
            if time.monotonic() > deadline:
                _signal_all(ranks, signal.SIGKILL)
        elif failed is not None:
            # Peers of a lost rank hang in a collective, where no Python signal handler runs: they get little time.
            _end_all(ranks, min(spec.grace_seconds, 5.0))
            raise RankFailed(failed, int(codes[failed] or 1), _tail(spec, failed))
        elif all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


def _stopped_code(spec: JobSpec, codes: Sequence[int | None], signum: int) -> int:
    """The exit code after a signal: the ranks' own when they agree; an error of one of them wins."""
    expected = {0, 128 + signum, -signum, -signal.SIGKILL}
    for rank, code in enumerate(codes):
        if code not in expected:
            raise RankFailed(rank, int(code or 1), _tail(spec, rank))
    return 0 if all(code == 0 for code in codes) else 128 + signum


def _signal_all(ranks: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    """To each rank's whole process group, so that its own children (data workers, compilers) get it too."""
    for process in ranks:
        if process.poll() is None:
            try:
                os.killpg(process.pid, signum)
            except ProcessLookupError:
                continue  # ended between the two calls


def _end_all(ranks: Sequence[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    if grace_seconds > 0:
        _signal_all(ranks, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    _signal_all(ranks, signal.SIGKILL)
    for process in ranks:
        process.wait()


def _tail(spec: JobSpec, rank: int) -> str:
    """The end of a rank's log; rank 0 has already said it on the terminal."""
    if rank == 0:
        return ""
    with log_file(spec, rank).open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        return stream.read().decode("utf-8", "replace").strip()
