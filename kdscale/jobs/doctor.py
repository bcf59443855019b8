"""`kdscale doctor`: what this machine is and what will work on it. Changes nothing, reaches no network."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

Severity = Literal["ok", "note", "bad"]


_MIN_TORCH = (2, 6)


_DEMO_MEMORY_BYTES = 8 * 10**9


_DEMO_DISK_BYTES = 6 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether it is fine, worth knowing, or in the way."""

    topic: str
    severity: Severity
    text: str


def examine(folder: Path) -> list[Finding]:
    """Look at everything that decides whether a run in `folder` can work."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _python, _torch, _packages, _triton, _compiler, _memory, lambda: _disk(folder), _ports,
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def verdicts(findings: list[Finding]) -> list[Finding]:
    """What will and what won't work, from the findings."""
    bad = [finding.topic for finding in findings if finding.severity == "bad"]
    by_topic = {finding.topic: finding for finding in findings}
    core = Finding("kdscale run", "bad" if bad else "ok", f"mend first: {', '.join(bad)}" if bad else "will work")
    gpu = by_topic["device"]
    has_gpu = gpu.text.startswith("cuda")
    slow = "CPU only: right for the demo and small models, not for billions of parameters"
    where = Finding("speed", "ok" if has_gpu else "note", "on the GPU" if has_gpu else slow)
    gguf = importlib.util.find_spec("gguf") is not None
    demo = Finding(
        "demo teacher", "ok" if gguf else "note",
        "can be fetched from its PyPI package" if gguf else "needs `pip install 'kdscale[gguf]'`",
    )  # fmt: skip
    return [core, where, demo]


def _python() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    return [
        Finding("python", "ok" if good else "bad", f"{platform.python_version()} on {platform.platform(terse=True)}")
    ]


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [
            Finding("torch", "bad", "not installed; install the build for your hardware, then kdscale again"),
            Finding("device", "note", "unknown without torch"),
        ]
    import torch

    from kdscale.runtime.device import cpu_has_bf16

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    severity: Severity = "ok" if version >= _MIN_TORCH else "bad"
    out = [Finding("torch", severity, f"{torch.__version__} ({build})")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            out.append(Finding("device", "ok", f"cuda:{index} {card.name}, {card.total_memory / 2**30:.0f} GiB"))
    else:
        seen = shutil.which("nvidia-smi") is not None
        why = "; a GPU driver is here, but this torch build does not use it" if seen else ""
        out.append(Finding("device", "note", f"CPU, {os.cpu_count()} cores{why}"))
        fast = "in hardware" if cpu_has_bf16() else "emulated and slow: dtype auto takes float32"
        out.append(Finding("bf16 on this CPU", "ok" if cpu_has_bf16() else "note", fast))
    return out


def _packages() -> list[Finding]:
    out = []
    for name in ("transformers", "deepspeed", "safetensors", "accelerate"):
        try:
            out.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            out.append(Finding(name, "bad", f"not installed; pip install {name}"))
    if importlib.util.find_spec("deepspeed") is not None:
        # In a process of its own: importing DeepSpeed probes accelerators and prints, and a broken install may abort.
        probe = subprocess.run(
            [sys.executable, "-c", "import deepspeed"], capture_output=True, text=True, timeout=120, check=False
        )
        if probe.returncode:
            last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
            out.append(Finding("deepspeed import", "bad", f"fails: {last}"))
    return out


def _triton() -> list[Finding]:
    try:
        return [Finding("triton", "ok", metadata.version("triton"))]
    except metadata.PackageNotFoundError:
        return [Finding("triton", "note", "not installed; needed only for the GPU kernels")]


def _compiler() -> list[Finding]:
    found = [name for name in ("g++", "ninja") if shutil.which(name)]
    text = ", ".join(found) or "none; not needed, kdscale builds no DeepSpeed extension"
    return [Finding("compiler", "ok" if len(found) == 2 else "note", text)]


def _memory() -> list[Finding]:
    memory = psutil.virtual_memory()
    severity: Severity = "ok" if memory.total >= 0.9 * _DEMO_MEMORY_BYTES else "note"
    text = f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free (the demo needs up to 8 GB)"
    return [Finding("memory", severity, text)]


def _disk(folder: Path) -> list[Finding]:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    severity: Severity = "ok" if free >= _DEMO_DISK_BYTES else "note"
    out = [Finding("disk", severity, f"{free / 1e9:.1f} GB free at {existing} (the demo needs about 6 GB)")]
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        out.append(Finding("write access", "bad", f"{existing}: {error.strerror}"))
    return out


def _ports() -> list[Finding]:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen(1)
            with socket.create_connection(probe.getsockname(), timeout=2):
                pass
    except OSError as error:
        return [Finding("loopback port", "bad", f"cannot listen and connect on 127.0.0.1: {error.strerror or error}")]
    return [Finding("loopback port", "ok", "listening and connecting on 127.0.0.1 works")]
