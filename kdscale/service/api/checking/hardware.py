"""The machine that the service runs on, without torch: its GPUs by name, its memory, its disk."""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from typing import Any

import psutil

from kdscale.service.settings import ServiceSettings
from kdscale.sizing.gpus import find_gpu, known_gpus

_QUERY = (
    "nvidia-smi",
    "--query-gpu=uuid,name,memory.total,memory.used,utilization.gpu",
    "--format=csv,noheader,nounits",
)
_SECONDS, _KEPT_SECONDS = 10.0, 5.0
_MIB = 1 << 20


def gpus() -> list[dict[str, Any]]:
    """The GPUs that the driver lists, asked for at most every few seconds; none without a driver."""
    return _gpus(int(time.monotonic() / _KEPT_SECONDS))


@functools.lru_cache(maxsize=1)
def _gpus(_period: int) -> list[dict[str, Any]]:
    if shutil.which(_QUERY[0]) is None:
        return []
    try:
        listed = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):  # a driver that does not answer
        return []
    return parse_gpus(listed)


def parse_gpus(listed: str) -> list[dict[str, Any]]:
    """The GPUs in what nvidia-smi prints; figures that it does not know are None."""
    found = []
    for line in listed.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5:
            total, used, busy = (float(part) if part.replace(".", "", 1).isdigit() else None for part in parts[2:])
            found.append(
                {
                    "uuid": parts[0], "name": parts[1], "memory_bytes": None if total is None else int(total) * _MIB,
                    "used_bytes": None if used is None else int(used) * _MIB,
                    "busy": None if busy is None else busy / 100,
                }
            )  # fmt: skip
    return found


def gpus_of() -> tuple[str, int] | None:
    """The name by which sizing knows this machine's GPUs, and how many there are; None where it knows none."""
    found = gpus()
    words = found[0]["name"].lower().replace("-", " ").split() if found else []
    memory = (found[0]["memory_bytes"] or 0) if found else 0
    names = [name for name in known_gpus() if name.partition("-")[0] in words]
    if not names:
        return None
    return min(names, key=lambda name: abs(find_gpu(name).memory - memory)), len(found)


def machine_facts(settings: ServiceSettings) -> dict[str, Any]:
    """Processors, memory and disk."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(settings.folder)
    return {
        "gpus": gpus(),
        "processors": psutil.cpu_count() or 1,
        "load": psutil.getloadavg()[0],
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "disk_bytes": disk.total,
        "disk_free_bytes": disk.free,
    }
