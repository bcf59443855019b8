"""The GPUs that a plan knows by name (gpus.json), and a cluster of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from kdscale.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """FLOP/s of dense bf16 products, bytes of memory, bytes/s: HBM, to a GPU of its node, to another node, to the host.

    Bandwidths are one way and a GPU.
    """

    name: str
    flops: float
    memory: float
    hbm: float
    link: float
    network: float
    pcie: float


@dataclass(frozen=True)
class Cluster:
    """`host_memory` bytes a node, `host_bandwidth` bytes/s a node (what an offloaded Adam runs at)."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    host_memory: float
    host_bandwidth: float = 200e9

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def collective(self, whole: float) -> float:
        """Seconds at full bandwidth in which every rank gathers (or reduce-scatters) `whole` bytes over all ranks.

        Each GPU takes (ranks - 1)/ranks of it over its links, each node (nodes - 1)/nodes through all its network
        cards together; the slower of the two sets the time.
        """
        inside = whole * (self.ranks - 1) / self.ranks / self.gpu.link if self.gpus_per_node > 1 else 0.0
        across = whole * (self.nodes - 1) / self.nodes / (self.gpus_per_node * self.gpu.network)
        return max(inside, across)

    def within_node(self, whole: float) -> float:
        """As `collective`, among the GPUs of one node."""
        return replace(self, nodes=1).collective(whole)


def known_gpus() -> list[str]:
    return sorted(_table())


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError for a name that is not in gpus.json."""
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
    data = json.loads((Path(__file__).parent / "gpus.json").read_text(encoding="utf-8"))
    return {
        key: Gpu(**{k: v for k, v in row.items() if k != "memory_gib"}, memory=row["memory_gib"] * GIB)
        for key, row in data["gpus"].items()
    }


# Dense bf16 FLOP/s with fp32 accumulation, from the makers' data sheets; the first name that is part of the device's
# name counts, so longer names come first.
_PEAK_BF16: dict[str, float] = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_by_name(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, from the name the driver gives it."""
    words = name.replace("-", " ")
    return next((peak for key, peak in _PEAK_BF16.items() if f" {key} " in f" {words} "), None)
