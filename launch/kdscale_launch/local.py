"""All ranks on this machine. None outlives the launcher, and none waits for a rank that is gone."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from kdscale_launch.job import HUNG_EXIT_CODE, STOPPED_EXIT_CODE, JobSpec, RankFailed, everything_saved
from kdscale_launch.processes import Process, end_groups, is_stopped, request_stacks, signal_groups, start_process, tail
from kdscale_launch.watchdog import WAITING, beat

_POLL_SECONDS = 0.1
_SETTLE_SECONDS = 5.0  # ranks that wait for each other hang for about as long, not to the second
_STACKS_SECONDS = 1.0
# A job system may signal every process of the job, and the launcher above passes the same signal on: that counts once.
SAME_SIGNAL_SECONDS = 2.0

SignalHandler = Callable[[int, FrameType | None], None]


def run_local(spec: JobSpec) -> int:
    """Run to the end; returns 0, 75 after a SIGTERM on which all ranks saved, or 128 + the signal that stopped it.

    SIGINT and SIGTERM are passed on to every rank, which then has `grace_seconds` to save; a second signal kills.
    Raises RankFailed for the first rank that fails, after the others were ended, and CannotStart. Must be called from
    the main thread (signal handlers, and the kernel's parent-death signal).
    """
    port = spec.place.master_port if spec.place else free_port()
    with ExitStack() as stack:
        ranks: list[Process] = []
        stack.callback(end_groups, ranks, 0.0)  # whatever happens, nothing is left running
        received_signals = stack.enter_context(_forward_signals(ranks))
        for index in range(spec.processes):
            ranks.append(_start_rank(spec, index, port, stack))
        return _wait(spec, ranks, received_signals)


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that was free on `address` (empty: on all addresses) a moment ago."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def rank_environment(spec: JobSpec, index: int, port: int) -> dict[str, str]:
    """The environment that torch.distributed's env:// and DeepSpeed read, for this machine's rank number `index`."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if spec.place is None else ()
    interfaces = {name: os.environ.get(name, loopback) for name in names}  # nothing on this machine is for the network
    world = spec.place.world_size if spec.place else spec.processes
    local_world = (spec.place.local_world_size if spec.place else None) or spec.processes
    return {
        **os.environ,
        **interfaces,
        **spec.env,
        "RANK": str(spec.first_rank + index),
        "LOCAL_RANK": str((spec.place.first_local_rank if spec.place else 0) + index),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": spec.place.master_addr if spec.place else "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def log_file(spec: JobSpec, index: int) -> Path:
    """Where this machine's rank number `index` writes its output; the first one writes to the terminal instead."""
    return spec.log_dir / f"rank-{spec.first_rank + index}.log"


def _start_rank(spec: JobSpec, index: int, port: int, stack: ExitStack) -> Process:
    output: Any = None
    if index > 0:
        spec.log_dir.mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(log_file(spec, index).open("wb"))
    return start_process(spec.command, rank_environment(spec, index, port), spec.cwd, output)


@contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, SignalHandler]) -> Iterator[None]:
    """Handle these signals within the block, and restore the handlers before it. Main thread only."""
    previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def _forward_signals(ranks: Sequence[Process]) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGUSR1 on to the ranks; the list collects the first two."""
    received: list[int] = []
    first = [0.0]

    def forward(signum: int, frame: FrameType | None) -> None:
        if received and signum == received[0] and time.monotonic() - first[0] < SAME_SIGNAL_SECONDS:
            return
        first[0] = first[0] or time.monotonic()
        received.append(signum)
        signal_groups(ranks, signum if len(received) == 1 else signal.SIGKILL)

    def forward_stack_request(signum: int, frame: FrameType | None) -> None:
        request_stacks(ranks)

    handlers = {signal.SIGINT: forward, signal.SIGTERM: forward, signal.SIGUSR1: forward_stack_request}
    with signal_handlers(handlers):
        yield received


def _wait(spec: JobSpec, ranks: Sequence[Process], received_signals: list[int]) -> int:
    """See `run_local`."""
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((index for index, code in enumerate(codes) if code not in (None, 0)), None)
        if received_signals:
            deadline = min(deadline, time.monotonic() + spec.grace_seconds)
            if all(code is not None for code in codes):
                return _code_after_signal(spec, codes, received_signals[0])
            if time.monotonic() > deadline:
                signal_groups(ranks, signal.SIGKILL)
        elif failed is not None and codes[failed] == STOPPED_EXIT_CODE:
            received_signals.append(signal.SIGTERM)  # one rank got it from elsewhere, and all stop at the same step
        elif failed is not None:
            if codes[failed] == HUNG_EXIT_CODE:
                raise _find_hung_rank(spec, ranks, failed)
            # Peers of a lost rank hang in a collective, where no Python signal handler runs: they get little time.
            end_groups(ranks, min(spec.grace_seconds, 5.0))
            raise RankFailed(spec.first_rank + failed, int(codes[failed] or 1), _log_tail(spec, failed))
        elif all(code == 0 for code in codes):
            return 0
        beat()  # ranks that hang have watchdogs of their own
        time.sleep(_POLL_SECONDS)


def _find_hung_rank(spec: JobSpec, ranks: Sequence[Process], first: int) -> RankFailed:
    """The error of the rank that the others wait for, once `first` has hung; asks all ranks for their stacks."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    stopped = [index for index, process in enumerate(ranks) if process.poll() is None and is_stopped(process.pid)]
    if any(process.poll() is None for process in ranks):
        request_stacks(ranks)
        time.sleep(_STACKS_SECONDS)
    if stopped:
        return RankFailed(spec.first_rank + stopped[0], HUNG_EXIT_CODE, "stopped by a signal, it makes no progress")
    hung = [index for index, process in enumerate(ranks) if process.poll() == HUNG_EXIT_CODE]
    causes = [index for index in hung if index > 0 and WAITING not in _log_tail(spec, index)]  # the first has no log
    culprit = (causes or hung or [first])[0]
    return RankFailed(spec.first_rank + culprit, HUNG_EXIT_CODE, _log_tail(spec, culprit))


def _code_after_signal(spec: JobSpec, codes: Sequence[int | None], signum: int) -> int:
    """See `run_local`. Raises RankFailed for a rank with an error."""
    expected = {0, 128 + signum, -signum, -signal.SIGKILL, STOPPED_EXIT_CODE}
    for index, code in enumerate(codes):
        if code not in expected:
            raise RankFailed(spec.first_rank + index, int(code or 1), _log_tail(spec, index))
    if all(code == 0 for code in codes):
        return 0
    return STOPPED_EXIT_CODE if signum == signal.SIGTERM and everything_saved(codes) else 128 + signum


def _log_tail(spec: JobSpec, index: int) -> str:
    """The end of a rank's log; empty for the first, which printed to the terminal."""
    return "" if index == 0 else tail(log_file(spec, index))
