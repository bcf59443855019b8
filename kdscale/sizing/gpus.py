"""The GPUs that gpus.json knows, by a short name or by their driver's name, and a cluster of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kdscale.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; bandwidths are in bytes/s, in one direction, per GPU."""

    name: str
    flops: float  # a second, of dense bf16 products
    memory: float  # bytes
    hbm: float
    link: float  # to another GPU of its node
    network: float  # to another node
    pcie: float  # to its host
    float8: float = 0.0  # FLOP/s of products in float8 beside those in bf16; 0: none that the teacher can use


@dataclass(frozen=True)
class GpuCluster:
    """Nodes of GPUs of one kind."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    host_memory: float  # bytes per node
    host_bandwidth: float = 200e9  # bytes/s per node: what an offloaded Adam runs at

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus_per_node

    def collective(self, size: float) -> float:
        """Seconds at full bandwidth in which every rank gathers (or reduce-scatters) `size` bytes over all ranks.

        Each GPU takes (ranks - 1)/ranks of it over its links, each node (nodes - 1)/nodes through all its network
        cards together; the slower of the two sets the time.
        """
        inside = size * (self.ranks - 1) / self.ranks / self.gpu.link if self.gpus_per_node > 1 else 0.0
        across = size * (self.nodes - 1) / self.nodes / (self.gpus_per_node * self.gpu.network)
        return max(inside, across)

    def within_node(self, size: float) -> float:
        """Seconds as `collective` counts them, among the GPUs of one node."""
        return replace(self, nodes=1).collective(size)


def known_gpus() -> list[str]:
    """The names that `find_gpu` takes."""
    return sorted(_table())


def find_gpu(name: str) -> Gpu:
    """A GPU by its short name, such as `h100`. Raises ConfigError for a name that is not in gpus.json."""
    try:
        return _table()[name.lower()]
    except KeyError:
        raise ConfigError(
            f"--gpu {name}",
            expected="one of " + ", ".join(known_gpus()),
            hint="for another one name the nearest, and give --gpu-memory, --flops and --bandwidth",
        ) from None


@cache
def _table() -> dict[str, Gpu]:
    out = {}
    for key, row in _data()["gpus"].items():
        flops = peak_by_name(row["name"])
        assert flops is not None, f"gpus.json has no peak for {row['name']}"
        bandwidths = {field: row[field] for field in ("hbm", "link", "network", "pcie")}
        out[key] = Gpu(row["name"], flops, row["memory_gib"] * GIB, **bandwidths, float8=row.get("float8", 0.0))
    return out


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((Path(__file__).parent / "gpus.json").read_text(encoding="utf-8"))
    return data


def peak_by_name(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU from the name that its driver gives it; None for one that gpus.json does not list."""
    words = name.replace("-", " ")
    peaks: dict[str, float] = _data()["peak_flops"]
    return next((peak for key, peak in peaks.items() if f" {key} " in f" {words} "), None)
