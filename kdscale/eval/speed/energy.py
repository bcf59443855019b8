"""What a GPU's work costs in joules, by the counter in the GPU itself."""

from __future__ import annotations

from collections.abc import Callable

import torch


class EnergyCounter:
    """Joules that this process's GPU has used, counted by the GPU (NVML, package nvidia-ml-py); never on a CPU.

    The counter is the whole card's: what else runs there is in it. It moves some ten times a second, so that only
    differences over seconds mean anything. `why_not`: why there is none, None where there is.
    """

    def __init__(self, device: torch.device):
        self._read: Callable[[], float] | None = None
        self.why_not: str | None = "a CPU does not tell"
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            self.why_not = "the package nvidia-ml-py is not installed (extra gpu)"
            return
        try:
            pynvml.nvmlInit()
            # by its UUID: CUDA_VISIBLE_DEVICES renumbers the cards for torch and not for NVML
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except (pynvml.NVMLError, AttributeError) as error:  # AttributeError: a GPU that is not NVIDIA's has no UUID
            self.why_not = f"NVML has no energy counter for this GPU: {error}"
            return
        self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        self.why_not = None

    def joules(self) -> float | None:
        """What the counter shows now; None where there is no counter."""
        return None if self._read is None else self._read()
