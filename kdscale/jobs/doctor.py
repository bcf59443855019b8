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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from kdscale.runtime.versions import OLDEST, is_too_old, version_of

Severity = Literal["ok", "note", "bad"]
_DEMO_MEMORY_BYTES = 8 * 10**9
_DEMO_DISK_BYTES = 6 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line of a table: the topic, whether it is fine, worth knowing or in the way, and what to show."""

    topic: str
    severity: Severity
    text: str


@dataclass(frozen=True)
class CudaDevice:
    """A GPU that torch can use."""

    name: str
    memory_bytes: int
    has_bf16: bool = True  # multiplies it in hardware


@dataclass(frozen=True)
class Examination:
    """What this machine has. `findings` are for people; decisions are taken from the other fields."""

    findings: list[Finding]
    gpus: tuple[CudaDevice, ...] = ()
    reads_gguf: bool = False


def examine(folder: Path) -> Examination:
    """Look at everything that decides whether a run in `folder` can work."""
    gpus = _cuda_devices()
    findings = [
        _python(),
        *_torch(gpus),
        *_packages(),
        _triton(bool(gpus)),
        *_c_kernels(),
        _compiler(),
        _memory(),
        *_disk(folder),
        _ports(),
    ]
    return Examination(findings, gpus, importlib.util.find_spec("gguf") is not None)


def verdicts(examination: Examination) -> list[Finding]:
    """What will and what won't work on the examined machine."""
    bad = [finding.topic for finding in examination.findings if finding.severity == "bad"]
    slow = "CPU only: right for the demo and small models, not for billions of parameters"
    get_gguf = "needs `pip install 'kdscale[gguf]'`"
    return [
        Finding("kdscale run", "bad" if bad else "ok", f"fix first: {', '.join(bad)}" if bad else "will work"),
        Finding("speed", "ok", "on the GPU") if examination.gpus else Finding("speed", "note", slow),
        Finding("demo teacher", "ok", "can be fetched from its PyPI package")
        if examination.reads_gguf
        else Finding("demo teacher", "note", get_gguf),
    ]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "bad", f"{platform.python_version()} on {platform.platform(terse=True)}")


def _cuda_devices() -> tuple[CudaDevice, ...]:
    """The GPUs that torch can use, in order; none without torch."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    from kdscale.runtime.device import gpu_has_bf16

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        found.append(CudaDevice(card.name, card.total_memory, gpu_has_bf16(index)))
    return tuple(found)


def _torch(gpus: tuple[CudaDevice, ...]) -> list[Finding]:
    """torch's version, and the devices it runs on."""
    if importlib.util.find_spec("torch") is None:
        return [
            Finding("torch", "bad", "not installed; install the build for your hardware, then kdscale again"),
            Finding("device", "note", "unknown without torch"),
        ]
    import torch

    from kdscale.runtime.device import cpu_has_bf16
    from kdscale_kernels.fused.products import gives_fp32_results

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    findings = [not_too_old(Finding("torch", "ok", f"{torch.__version__} ({build})"), torch.__version__)]
    for index, gpu in enumerate(gpus):
        slow = "" if gpu.has_bf16 else "; no bf16 in hardware: dtype auto takes float32"
        text = f"cuda:{index} {gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB{slow}"
        findings.append(Finding("device", "note" if slow else "ok", text))
    if gpus and not gives_fp32_results():
        text = "bf16 products with fp32 results need torch 2.8: the head's products run in fp32, several times slower"
        findings.append(Finding("products", "note", text))
    if not gpus:
        has_driver = shutil.which("nvidia-smi") is not None
        unused = "; a GPU driver is here, but this torch build does not use it" if has_driver else ""
        findings.append(Finding("device", "note", f"CPU, {os.cpu_count()} cores{unused}"))
        speed = "in hardware" if cpu_has_bf16() else "emulated and slow: dtype auto takes float32"
        findings.append(Finding("bf16 on this CPU", "ok" if cpu_has_bf16() else "note", speed))
    return findings


def not_too_old(finding: Finding, version: str | None) -> Finding:
    """The finding of a package of this version, or why the version is in the way."""
    if not is_too_old(finding.topic, version):
        return finding
    needed = f"{OLDEST[finding.topic]} or newer is needed"
    return Finding(finding.topic, "bad", f"{finding.text}; {needed}")


def _packages() -> list[Finding]:
    """The libraries that every run needs, and whether DeepSpeed can be imported."""
    versions = {name: version_of(name) for name in ("transformers", "deepspeed", "safetensors", "accelerate")}
    findings = [
        not_too_old(Finding(name, "ok" if version else "bad", version or f"not installed; pip install {name}"), version)
        for name, version in versions.items()
    ]
    if importlib.util.find_spec("deepspeed") is not None:
        # In a process of its own: importing DeepSpeed probes accelerators and prints, and a broken install may abort.
        probe = subprocess.run(
            [sys.executable, "-c", "import deepspeed"], capture_output=True, text=True, timeout=120, check=False
        )
        if probe.returncode:
            message = (probe.stderr.strip().splitlines() or ["no message"])[-1]
            findings.append(Finding("deepspeed import", "bad", f"fails: {message}"))
    return findings


def _triton(has_gpu: bool) -> Finding:
    """Triton's version, and whether it can launch a kernel, which takes a C compiler and Python's headers."""
    version = version_of("triton")
    if version is None or importlib.util.find_spec("torch") is None:
        return Finding("triton", "note", version or "not installed; needed only for the GPU kernels")
    from kdscale_kernels.launch_trial import launch_obstacle

    obstacle = launch_obstacle(0 if has_gpu else None)
    if obstacle is None:
        done = "launched a kernel on cuda:0" if has_gpu else "builds what a launch needs"
        return Finding("triton", "ok", f"{version}, {done}")
    return Finding("triton", "note", f"{version}; the kernels run in torch on a GPU, slower: {obstacle}")


def _c_kernels() -> list[Finding]:
    """Whether the kernels in C, for a language-model head in bf16 on a CPU, can be compiled."""
    if importlib.util.find_spec("torch") is None:
        return []
    from kdscale_kernels.c_kernels.library import library_obstacle

    obstacle = library_obstacle()
    text = f"the kernels run in torch on a CPU, slower: {obstacle}" if obstacle else "compiled for this processor"
    return [Finding("C kernels", "note" if obstacle else "ok", text)]


def _compiler() -> Finding:
    tools = [name for name in ("g++", "ninja") if shutil.which(name)]
    text = ", ".join(tools) or "none; not needed, kdscale builds no DeepSpeed extension"
    return Finding("compiler", "ok" if len(tools) == 2 else "note", text)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    severity: Severity = "ok" if memory.total >= 0.9 * _DEMO_MEMORY_BYTES else "note"
    text = f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free (the demo needs up to 8 GB)"
    return Finding("memory", severity, text)


def _disk(folder: Path) -> list[Finding]:
    """Free space where `folder` will be, and whether it can be written."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    severity: Severity = "ok" if free >= _DEMO_DISK_BYTES else "note"
    findings = [Finding("disk", severity, f"{free / 1e9:.1f} GB free at {existing} (the demo needs about 6 GB)")]
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        findings.append(Finding("write access", "bad", f"{existing}: {error.strerror}"))
    return findings


def _ports() -> Finding:
    """Whether ranks on this machine can reach each other."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen(1)
            with socket.create_connection(probe.getsockname(), timeout=2):
                pass
    except OSError as error:
        return Finding("loopback port", "bad", f"cannot listen and connect on 127.0.0.1: {error.strerror or error}")
    return Finding("loopback port", "ok", "listening and connecting on 127.0.0.1 works")
