"""What this machine has for runs to hold: its GPUs, or slots that are only counted. Without torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kdscale.errors import ConfigError
from kdscale.service.settings import ServiceSettings

_QUERY_SECONDS = 30.0
_GPU, _SLICE = re.compile(r"^GPU \d+:.*\(UUID: (GPU-[^)\s]+)\)"), re.compile(r"^\s+MIG .*\(UUID:\s*(MIG-[^)\s]+)\)")


@dataclass(frozen=True)
class Machine:
    """How many slots there are, and the device of each; no devices where slots are only counted."""

    slots: int
    devices: tuple[str, ...] = ()

    def choose(self, wanted: int, held: Collection[str]) -> list[str] | None:
        """The first `wanted` devices that nobody holds, none at all on a CPU; None when there are too few."""
        free = [device for device in self.devices if device not in held]
        if not self.devices:
            return []
        return free[:wanted] if len(free) >= wanted else None


def find_machine(settings: ServiceSettings, environment: Mapping[str, str] = os.environ) -> Machine:
    """This machine's slots: its GPUs or those that CUDA_VISIBLE_DEVICES names, or one; `settings.slots` limits them.

    Raises ConfigError for more slots than there are GPUs.
    """
    devices = visible_devices(environment)
    slots = settings.slots if settings.slots is not None else max(1, len(devices))
    if devices and slots > len(devices):
        raise ConfigError("slots", expected=f"at most {len(devices)}, the GPUs of this machine", got=str(slots))
    return Machine(slots, devices[:slots])


def visible_devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them; slices of a MIG card in the place of the card."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part.strip() for part in named.split(",") if part.strip() not in ("", "-1", "NoDevFiles"))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):  # no driver, or one that does not answer
        return ()
    return parse_list(listed)


def parse_list(listed: str) -> tuple[str, ...]:
    """The devices in what `nvidia-smi -L` prints: one line a GPU, and below it one a slice."""
    cards: list[list[str]] = []
    for line in listed.splitlines():
        if card := _GPU.match(line):
            cards.append([card[1]])
        elif cards and (part := _SLICE.match(line)):
            cards[-1].append(part[1])
    return tuple(device for card in cards for device in (card[1:] or card))
