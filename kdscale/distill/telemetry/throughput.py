"""How fast a distillation is beside what the device could do: model FLOPs, peak FLOP/s, MFU, memory, time by phase.

Model FLOPs are what the mathematics needs, whatever is recomputed or done twice: a multiply-add is 2, a backward pass
is twice its forward (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kdscale.sizing.gpus import peak_by_name


def peak_flops(given: float | None, device: torch.device, dtype: torch.dtype) -> float | None:
    """What one rank's device can do a second: the config's word, else by the GPU's name in bf16; None: not known."""
    if given is not None:
        return given
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


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
