"""How fast a distillation is beside what the device could do: model FLOPs, peak FLOP/s, MFU, memory, time by phase.

Model FLOPs are what the mathematics needs, whatever is recomputed or done twice: a multiply-add is 2, a backward pass
is twice its forward (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale.families import load_family
from kdscale.families.family import EMBEDDING_ROLES

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


@dataclass(frozen=True)
class ModelFlops:
    """Forward FLOPs of one model: `per_token` up to the final hidden state, `per_label` of the head."""

    per_token: float
    per_label: float

    @classmethod
    def of(cls, config: Mapping[str, Any], seq_len: int) -> ModelFlops:
        """From the shapes in config.json. Of a mixture, the experts that a token is routed to.

        Attention counts every position of the sequence, as PaLM does, though the causal mask and the borders between
        packed documents need less than half of them.
        """
        family = load_family(dict(config), "config.json")
        dims, count = family.dims(dict(config)), family.count_params(dict(config))
        matrices = sum(
            math.prod(spec.shape)
            for spec in family.tensors(dict(config)).values()
            if spec.role not in EMBEDDING_ROLES and len(spec.shape) > 1
        )
        attention = 4 * dims.layers * dims.heads * dims.head_dim * seq_len  # QKᵀ and AV
        return cls(2.0 * (matrices - (count.total - count.active)) + attention, 2.0 * dims.hidden * dims.vocab)


def step_flops(teacher: ModelFlops | None, student: ModelFlops, tokens: float, labels: float) -> float:
    """One step's model FLOPs over all ranks: the teacher forward, the student forward and backward, heads included.

    `teacher` is None where other machines run it.
    """
    forwards = [(3, student), *([(1, teacher)] if teacher else [])]
    return sum(times * (tokens * model.per_token + labels * model.per_label) for times, model in forwards)


def peak_flops(given: float | None, device: torch.device, dtype: torch.dtype) -> float | None:
    """What one rank's device can do a second: the config's word, else by the GPU's name in bf16; None: not known."""
    if given is not None:
        return given
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, from the name the driver gives it."""
    words = name.replace("-", " ")
    return next((peak for key, peak in _PEAK_BF16.items() if f" {key} " in f" {words} "), None)


def peak_memory(device: torch.device) -> float:
    """Bytes: on a GPU the most that torch has had allocated there, else the process's largest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the process was before it became this program
        text = status.read_text(encoding="utf-8")
        return float(text.split("VmHWM:")[1].split()[0]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class SpeedReport:
    """Adds up steps and says in one line how fast they were and where the time went."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._tokens = self._flops_share = self._seconds = 0.0
        self._phases: dict[str, float] = {}

    def add(self, tokens: float, seconds: float, phases: Mapping[str, float], mfu: float | None) -> None:
        self._tokens += tokens
        self._seconds += seconds
        self._flops_share += (mfu or 0.0) * seconds
        for name, value in phases.items():
            self._phases[name] = self._phases.get(name, 0.0) + value

    def line(self, inside: str, memory: float) -> str:
        """The line; empty before the first step. `inside` is a phase that lies within the others."""
        if not self._seconds:
            return ""
        shares = {name: f"{name} {100 * value / self._seconds:.0f} %" for name, value in self._phases.items()}
        within = shares.pop(inside, "")
        parts = [f"{self._tokens / self._seconds:,.0f} tok/s"]
        parts += [f"MFU {100 * self._flops_share / self._seconds:.1f} %"] if self._flops_share else []
        parts += [", ".join(shares.values())]
        parts += [f"{within} (within these)"] if self._phases.get(inside) else []
        self._clear()
        return " · ".join([*parts, f"peak memory a rank {memory / 1e9:.2f} GB"])
