"""How fast a distillation runs: the device's peak for MFU (FLOPs are counted in kdscale/sizing/flops.py), and a line of
tokens/s, MFU, time by phase and memory for the log."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kdscale.sizing.gpus import peak_by_name


def peak_flops(given: float | None, device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one rank's device: what the config says, else by the GPU's name in bf16; None where it is not known."""
    if given is not None:
        return given
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


class SpeedReport:
    """Adds up steps, and writes one line on how fast they were and where the time went."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._tokens = self._mfu_seconds = self._seconds = 0.0
        self._phases: dict[str, float] = {}

    def add(self, tokens: float, seconds: float, phases: Mapping[str, float], mfu: float | None) -> None:
        """Count one step; `phases` are its seconds by phase."""
        self._tokens += tokens
        self._seconds += seconds
        self._mfu_seconds += (mfu or 0.0) * seconds
        for name, value in phases.items():
            self._phases[name] = self._phases.get(name, 0.0) + value

    def line(self, inside: str, memory: float) -> str:
        """The line on all steps since the last one; empty without any. `inside` is a phase within the others."""
        if not self._seconds:
            return ""
        texts = {name: f"{name} {100 * value / self._seconds:.0f} %" for name, value in self._phases.items()}
        within = texts.pop(inside, "")
        figures = [f"{self._tokens / self._seconds:,.0f} tok/s"]
        figures += [f"MFU {100 * self._mfu_seconds / self._seconds:.1f} %"] if self._mfu_seconds else []
        figures += [", ".join(texts.values())]
        figures += [f"{within} (within these)"] if self._phases.get(inside) else []
        self._clear()
        return " · ".join([*figures, f"peak memory per rank {memory / 1e9:.2f} GB"])
