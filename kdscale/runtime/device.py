"""The device, dtype and threads that this process uses."""

from __future__ import annotations

import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale.errors import ConfigError


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch has allocated on a GPU; on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: Linux carries its maximum over from the parent through exec, VmHWM starts anew
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def release_memory() -> None:
    """Give back what torch holds of memory that nothing uses any more; modules and their hooks are in cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether this is what Python or torch raises where memory does not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def put_on(device: torch.device, values: Sequence[float]) -> torch.Tensor:
    """Numbers of the host as a tensor (fp64) on `device`, without waiting for it, as `torch.tensor(device=)` would."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested sequences, mappings and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError when CUDA was asked for and is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device", expected="cuda", got="no CUDA device", hint="use auto, or run kdscale doctor"
        )
    return torch.device(name)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; elsewhere bf16 is emulated and slower than fp32."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capability:
        return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


# AMD's matrix cores for bf16: CDNA 1 to 4, RDNA 3 and 4 (AMD's ISA manuals, the MFMA and WMMA instructions).
_AMD_WITH_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def gpu_has_bf16(index: int | None = None) -> bool:
    """Whether the GPU (None: the current one) multiplies bf16 in hardware: NVIDIA from compute capability 8.0 on.

    torch.cuda.is_bf16_supported also says yes where bf16 is emulated (V100, T4), and to every AMD card.
    """
    card = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip:
        return bool(card.gcnArchName.startswith(_AMD_WITH_BF16))
    return bool(card.major >= 8)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 wherever the hardware multiplies it, else fp32: fp16 would need a loss scale."""
    if name == "auto":
        good = gpu_has_bf16(device.index) if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if good else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def set_threads(threads: int | None, processes: int = 1) -> int:
    """Set this process's CPU threads: `threads`, or the usable cores divided by `processes`; returns the number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    count = threads or max(1, cores // processes)
    torch.set_num_threads(count)
    return count


def device_name(device: str) -> str:
    """The name of the GPU or of the processor, as the system gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
