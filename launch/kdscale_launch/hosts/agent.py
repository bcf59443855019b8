"""`python -m kdscale_launch.hosts.agent`: what the launcher starts on each host, over ssh.

It takes orders as JSON lines on stdin and reports on stdout: runs the host's ranks in process groups of their own,
passes signals on, sends what one of them prints. When the launcher is gone (stdin closed, or silence for `dead_after`
seconds) it kills its ranks and leaves. Everything a rank needs, secrets too, comes over the pipe and is on no command
line.

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

from kdscale_launch.hosts.messages import LineBuffer, Message, decode, encode
from kdscale_launch.job import LaunchError
from kdscale_launch.local import free_port
from kdscale_launch.processes import Process, is_stopped, request_stacks, signal_groups, start, tail

_POLL_SECONDS = 0.1


_BEATS_A_DEADLINE = 4


_MAX_WAITING_BYTES = 1 << 22  # a dead link must not fill the memory with a rank's chatter


_MAX_READ_BYTES = 1 << 16


class Agent:
    """The state of one host: its connection to the launcher and the ranks of the current run."""

    def __init__(self, stdin: int, stdout: int):
        self._stdin, self._stdout = stdin, stdout
        for handle in (stdin, stdout):  # a write to a dead link must not stop the clock
            os.set_blocking(handle, False)
        self._lines = LineBuffer()
        self._waiting = bytearray()
        self._dead_after = 60.0
        self._heard = self._beat = time.monotonic()
        self._open = True
        self._run: Run | None = None

    def serve(self) -> int:
        """Until the launcher says leave or is gone; no rank is left behind."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_READ)
            while self._open:
                selector.select(_POLL_SECONDS)
                self._read()
                self._step()
                self._write()
        if self._run is not None:
            self._run.kill()
        return 0

    def _read(self) -> None:
        try:
            data = os.read(self._stdin, _MAX_READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._open = False
            return
        self._heard = time.monotonic()
        for line in self._lines.feed(data):
            message = decode(line)
            if message is not None:
                self._obey(message)

    def _obey(self, order: Message) -> None:
        match order["do"]:
            case "hello":
                self._dead_after = float(order["dead_after"])
                self._say({"say": "hello", "host": socket.gethostname(), "pid": os.getpid()})
            case "ping":
                self._say({"say": "pong", "id": order["id"], "time": time.time()})
            case "port":
                self._say({"say": "port", "port": free_port("")})
            case "run":
                try:
                    self._run = Run(order)
                    self._say({"say": "started", "pids": [process.pid for process in self._run.ranks.values()]})
                except (LaunchError, OSError) as error:
                    self._say({"say": "refused", "why": str(error)})
            case "signal" if self._run is not None:
                signal_groups(list(self._run.ranks.values()), int(order["signum"]))
            case "stacks" if self._run is not None:
                for rank in self._run.stopped():
                    self._say({"say": "stopped", "rank": rank})
                request_stacks(list(self._run.ranks.values()))
            case "end" if self._run is not None:
                self._run.end(float(order["grace"]))
            case "leave":
                self._open = False

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._heard > self._dead_after:
            self._open = False
        if now - self._beat > self._dead_after / _BEATS_A_DEADLINE:
            self._beat = now
            self._say({"say": "beat"})
        if self._run is not None:
            for report in self._run.reports():
                self._say(report)
            if self._run.over:
                self._run = None
                self._say({"say": "done"})

    def _say(self, message: Message) -> None:
        if message["say"] in ("output", "beat") and len(self._waiting) > _MAX_WAITING_BYTES:
            return
        self._waiting += encode(message)

    def _write(self) -> None:
        while self._waiting:
            try:
                done = os.write(self._stdout, self._waiting[: 1 << 16])
            except BlockingIOError:
                return
            except OSError:  # nobody reads any more
                self._open = False
                return
            del self._waiting[:done]


class Run:
    """The ranks of one order: started together, reported as they end.

    Log files are read in a thread: they may lie on shared storage, and storage that hangs must not keep the agent from
    giving signs of life, or from ending its ranks.
    """

    def __init__(self, order: Message):
        self.ranks: dict[int, Process] = {}
        self._stack = ExitStack()
        self._kill_at = float("inf")
        self._noticed: set[int] = set()
        self._reported: set[int] = set()
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Message] = queue.SimpleQueue()
        env = {**os.environ, **order["env"]}
        self._logs = Path(order["log_dir"] or self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            for about in order["ranks"]:
                rank = int(about["rank"])
                with self._log(rank).open("wb") as output:
                    self.ranks[rank] = start(order["command"], {**env, **about["env"]}, order["cwd"], output)
        except BaseException:
            self.kill()
            raise
        threading.Thread(target=self._read_logs, args=(list(order["follow"]),), daemon=True).start()

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank}.log"

    @property
    def over(self) -> bool:
        done = len(self._reported) == len(self.ranks)
        if done:
            self._stack.close()
        return done

    def reports(self) -> list[Message]:
        """What is new since the last call. Never waits."""
        if time.monotonic() > self._kill_at:
            signal_groups(list(self.ranks.values()), signal.SIGKILL)
        for rank, process in self.ranks.items():
            code = process.poll()
            if code is not None and rank not in self._noticed:
                self._noticed.add(rank)
                self._end_children(process)
                self._ended.put((rank, code))
        out: list[Message] = []
        while not self._found.empty():
            out.append(self._found.get())
        self._reported |= {message["rank"] for message in out if message["say"] == "exit"}
        return out

    def _read_logs(self, followed: list[int]) -> None:
        """What followed ranks print as they print it, and the last words of all."""
        logs = {rank: Follow(self._log(rank)) for rank in followed}
        for _ in self.ranks:
            ended: tuple[int, int] | None = None
            while ended is None:
                with suppress(queue.Empty):
                    ended = self._ended.get(timeout=_POLL_SECONDS)
                for rank, log in logs.items():
                    if text := log.read(to_the_end=ended is not None and ended[0] == rank):
                        self._found.put({"say": "output", "rank": rank, "text": text})
            rank, code = ended
            said = tail(self._log(rank)) if code else tail(self._log(rank), _MAX_READ_BYTES)
            self._found.put({"say": "exit", "rank": rank, "code": code, "tail": said})

    @staticmethod
    def _end_children(process: Process) -> None:
        """What a rank left running in its own group ends with it."""
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)

    def stopped(self) -> list[int]:
        """Ranks that some signal has stopped: they live, and do nothing."""
        return [rank for rank, process in self.ranks.items() if process.poll() is None and is_stopped(process.pid)]

    def end(self, grace: float) -> None:
        signal_groups(list(self.ranks.values()), signal.SIGTERM)
        self._kill_at = time.monotonic() + grace

    def kill(self) -> None:
        signal_groups(list(self.ranks.values()), signal.SIGKILL)
        for process in self.ranks.values():
            process.wait()
            self._end_children(process)
        self._stack.close()


class Follow:
    """What is appended to a file, in whole characters."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, to_the_end: bool) -> str:
        """What is new: 64 KiB at most, or all of it. Empty when the file has gone."""
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
