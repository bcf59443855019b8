"""For the benchmarks beside it: ranks as processes of this machine over gloo, and the peak memory of a process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SOURCES = [str(Path(__file__).resolve().parents[2] / folder) for folder in (".", "kernels", "launch")]
_SAMPLE_SECONDS = 0.02


def run_ranks(arguments: list[str], ranks: int, **environment: str) -> list[dict[str, Any]]:
    """Run `python ARGUMENTS` once per rank; returns what each printed last, as JSON. Exits when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ, "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **environment,
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"a rank ended with {process.returncode}:\n{errors[-3000:]}")
    return [json.loads(printed.strip().splitlines()[-1]) for printed, _ in outputs]


def memory_in_use() -> dict[str, int]:
    """Resident bytes of this process: anonymous, shared between processes, and mapped files.

    The kernel counts these anyway: walking the page tables (smaps) many times a second would disturb the measurement.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit("there is no /proc/self/status: this benchmark needs Linux")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    names = {"anonymous": "RssAnon", "shared": "RssShmem", "files": "RssFile"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


class MemoryWatch(threading.Thread):
    """The peaks of this process's memory in bytes, beyond what it has now; see `memory_in_use`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = memory_in_use()
        self._peak = dict.fromkeys(self.base, 0)
        self._finished = threading.Event()

    def _look(self) -> None:
        for name, value in memory_in_use().items():
            self._peak[name] = max(self._peak[name], value - self.base[name])

    def run(self) -> None:
        """Look until `finish` is called."""
        while not self._finished.wait(_SAMPLE_SECONDS):
            self._look()

    def finish(self) -> dict[str, int]:
        """End the thread; returns the peaks."""
        self._finished.set()
        self.join()
        self._look()
        return self._peak
