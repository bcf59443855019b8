"""`python -m kdscale_launch.hosts.agent`: what the launcher starts on each host, over ssh.

It takes orders as JSON lines on stdin and reports on stdout: it runs the host's ranks in process groups of their own,
passes signals on, and sends what the followed rank prints. When the launcher is gone (stdin is closed, or silent for
`dead_after` seconds), it kills its ranks and leaves. Everything a rank needs, secrets too, comes over the pipe; nothing
of it is on a command line.

Orders: hello, beat, ping, port, run, signal, stacks, end, leave. Reports: hello, beat, pong, port, started, output,
stopped, exit, done, refused.
"""

from __future__ import annotations

import codecs
import os
import queue
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from kdscale_launch.hosts.messages import BEATS_PER_DEADLINE, LineBuffer, Message, decode, encode
from kdscale_launch.job import LaunchError
from kdscale_launch.local import free_port
from kdscale_launch.processes import Process, is_stopped, request_stacks, signal_groups, start_process, tail

_POLL_SECONDS = 0.1
_MAX_UNSENT_BYTES = 1 << 22  # a dead link must not fill the memory with a rank's output
_MAX_READ_BYTES = 1 << 16


class Agent:
    """One host's side of the connection to the launcher, and the ranks that it was told to run."""

    def __init__(self, stdin: int, stdout: int):
        self._stdin, self._stdout = stdin, stdout
        for handle in (stdin, stdout):  # a write to a dead link must not stop the clock
            os.set_blocking(handle, False)
        self._lines = LineBuffer()
        self._unsent = bytearray()
        self._dead_after = 60.0
        self._last_heard = self._last_beat = time.monotonic()
        self._open = True
        self._ranks: HostRanks | None = None

    def serve(self) -> int:
        """Serve until the launcher orders to leave or is gone; no rank is left behind. Returns 0."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_READ)
            while self._open:
                selector.select(_POLL_SECONDS)
                self._read_orders()
                self._report_progress()
                self._send_reports()
        if self._ranks is not None:
            self._ranks.kill()
        return 0

    def _read_orders(self) -> None:
        try:
            data = os.read(self._stdin, _MAX_READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._open = False
            return
        self._last_heard = time.monotonic()
        for line in self._lines.feed(data):
            order = decode(line)
            if order is not None:
                self._obey(order)

    def _obey(self, order: Message) -> None:
        match order["order"]:
            case "hello":
                self._dead_after = float(order["dead_after"])
                self._report({"report": "hello", "host": socket.gethostname(), "pid": os.getpid()})
            case "ping":
                self._report({"report": "pong", "id": order["id"], "time": time.time()})
            case "port":
                self._report({"report": "port", "port": free_port("")})
            case "run":
                try:
                    self._ranks = HostRanks(order)
                    pids = [process.pid for process in self._ranks.processes.values()]
                    self._report({"report": "started", "pids": pids})
                except (LaunchError, OSError) as error:
                    self._report({"report": "refused", "reason": str(error)})
            case "signal" if self._ranks is not None:
                signal_groups(list(self._ranks.processes.values()), int(order["signum"]))
            case "stacks" if self._ranks is not None:
                for rank in self._ranks.stopped():
                    self._report({"report": "stopped", "rank": rank})
                request_stacks(list(self._ranks.processes.values()))
            case "end" if self._ranks is not None:
                self._ranks.end(float(order["grace"]))
            case "leave":
                self._open = False

    def _report_progress(self) -> None:
        now = time.monotonic()
        if now - self._last_heard > self._dead_after:
            self._open = False
        if now - self._last_beat > self._dead_after / BEATS_PER_DEADLINE:
            self._last_beat = now
            self._report({"report": "beat"})
        if self._ranks is not None:
            for report in self._ranks.new_reports():
                self._report(report)
            if self._ranks.all_reported:
                self._ranks.close()
                self._ranks = None
                self._report({"report": "done"})

    def _report(self, report: Message) -> None:
        if report["report"] in ("output", "beat") and len(self._unsent) > _MAX_UNSENT_BYTES:
            return
        self._unsent += encode(report)

    def _send_reports(self) -> None:
        while self._unsent:
            try:
                sent = os.write(self._stdout, self._unsent[: 1 << 16])
            except BlockingIOError:
                return
            except OSError:  # the launcher has closed its end
                self._open = False
                return
            del self._unsent[:sent]


class HostRanks:
    """The ranks of one `run` order: started together, each reported when it ends.

    Log files are read in a thread: they may lie on shared storage, and storage that hangs must not keep the agent from
    sending signs of life, or from ending its ranks.
    """

    def __init__(self, order: Message):
        self.processes: dict[int, Process] = {}
        self._stack = ExitStack()
        self._kill_at = float("inf")
        self._ended: set[int] = set()
        self._reported: set[int] = set()
        self._exits: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # (rank, exit code), for the log reader
        self._reports: queue.SimpleQueue[Message] = queue.SimpleQueue()
        env = {**os.environ, **order["env"]}
        self._logs = Path(order["log_dir"] or self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            for entry in order["ranks"]:
                rank = int(entry["rank"])
                with self._log(rank).open("wb") as output:
                    process = start_process(order["command"], {**env, **entry["env"]}, order["cwd"], output)
                self.processes[rank] = process
        except BaseException:
            self.kill()
            raise
        threading.Thread(target=self._read_logs, args=(list(order["follow"]),), daemon=True).start()

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank}.log"

    @property
    def all_reported(self) -> bool:
        """Whether `new_reports` has returned the end of every rank."""
        return len(self._reported) == len(self.processes)

    def new_reports(self) -> list[Message]:
        """The reports since the last call. Never waits."""
        if time.monotonic() > self._kill_at:
            signal_groups(list(self.processes.values()), signal.SIGKILL)
        for rank, process in self.processes.items():
            code = process.poll()
            if code is not None and rank not in self._ended:
                self._ended.add(rank)
                self._end_children(process)
                self._exits.put((rank, code))
        reports: list[Message] = []
        while not self._reports.empty():
            reports.append(self._reports.get())
        self._reported |= {report["rank"] for report in reports if report["report"] == "exit"}
        return reports

    def _read_logs(self, followed: list[int]) -> None:
        """In a thread: report what followed ranks print as they print it, and the end of every rank's log."""
        followers = {rank: LogFollower(self._log(rank)) for rank in followed}
        for _ in self.processes:
            rank_exit: tuple[int, int] | None = None
            while rank_exit is None:
                with suppress(queue.Empty):
                    rank_exit = self._exits.get(timeout=_POLL_SECONDS)
                for rank, follower in followers.items():
                    if text := follower.read(to_the_end=rank_exit is not None and rank_exit[0] == rank):
                        self._reports.put({"report": "output", "rank": rank, "text": text})
            rank, code = rank_exit
            log_tail = tail(self._log(rank)) if code else tail(self._log(rank), _MAX_READ_BYTES)
            self._reports.put({"report": "exit", "rank": rank, "exit_code": code, "log_tail": log_tail})

    @staticmethod
    def _end_children(process: Process) -> None:
        """Kill what a rank that has ended left running in its group."""
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)

    def stopped(self) -> list[int]:
        """Ranks that a signal has stopped: they are alive and make no progress."""
        return [rank for rank, process in self.processes.items() if process.poll() is None and is_stopped(process.pid)]

    def end(self, grace: float) -> None:
        """Send SIGTERM now and SIGKILL after `grace` seconds."""
        signal_groups(list(self.processes.values()), signal.SIGTERM)
        self._kill_at = time.monotonic() + grace

    def kill(self) -> None:
        """Kill all ranks and wait until they are gone."""
        signal_groups(list(self.processes.values()), signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
            self._end_children(process)
        self.close()

    def close(self) -> None:
        """Remove the temporary log folder, if there is one."""
        self._stack.close()


class LogFollower:
    """Reads what is appended to a file, in whole characters."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, to_the_end: bool) -> str:
        """The text since the last call: at most 64 KiB, or all of it. Empty when the file is gone."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read(-1 if to_the_end else _MAX_READ_BYTES)
        except FileNotFoundError:
            return ""
        self._offset += len(data)
        return self._decoder.decode(data, final=to_the_end)


if __name__ == "__main__":
    sys.exit(Agent(0, 1).serve())
