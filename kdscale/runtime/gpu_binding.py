"""Which GPU this process computes on, whether this host has one for each rank, and that no two ranks have the same.

Job systems differ in what a rank sees: all GPUs of its host (our own launcher, torchrun), or only those that are its
own (Slurm with --gpus-per-task, one pod a rank), by number or by UUID, as whole cards or as MIG slices.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping

import torch

from kdscale.errors import ConfigError
from kdscale.runtime.device import resolve_device

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Tells NCCL to accept several ranks on one card, which it refuses otherwise; for the slices of a MIG card.
_SHARED_CARD = "NCCL_MULTI_RANK_GPU_ENABLE"


def visible_gpus() -> int:
    """How many GPUs this process may use. Takes no memory on any of them."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def bound_index(number: int, visible: int) -> int:
    """Which of the `visible` GPUs is that of the rank with this `number` on its host.

    Its own number where every rank sees all GPUs. Where each sees only its own, the remainder is among them: of one it
    is 0. Fewer GPUs than ranks are shared then, which `check_gpus` and `claim_gpu` find.
    """
    return number % visible


def rank_device(name: str) -> torch.device:
    """This rank's device, made torch's current one; `name` is runtime.device. Raises as `resolve_device` does."""
    device = resolve_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", bound_index(local_rank(os.environ), visible_gpus()))
        torch.cuda.set_device(device)
    return device


def check_gpus(device: str, ranks: Mapping[str, int]) -> None:
    """Check that this host has a GPU for each rank; `ranks` is how many of them each config field or option asks for.

    They must all see the same GPUs as this process does. Raises ConfigError, naming the fields. Nothing on a CPU.
    """
    if resolve_device(device).type != "cuda" or _may_share(os.environ):
        return
    gpus = visible_gpus()
    if short := {field: count for field, count in ranks.items() if count > gpus}:
        raise ConfigError(
            ", ".join(short),
            expected=f"at most {gpus}, the GPUs that are visible here{_visible_says(os.environ)}: one for each rank",
            got=", ".join(f"{field} = {count}" for field, count in short.items()),
            hint="lower it, make more GPUs visible, or set runtime.device to cpu",
        )


class GpuClaim:
    """A rank's right to its GPU; it ends with `close`, or with the process."""

    def __init__(self, held: socket.socket | None):
        self._held = held

    def close(self) -> None:
        """Give the GPU back."""
        if self._held is not None:
            self._held.close()


def claim_gpu(device: str, environment: Mapping[str, str]) -> GpuClaim:
    """Claim this rank's GPU among the ranks of one job; hold the claim for as long as the rank lives.

    `environment`: with the rank's LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Works before the ranks meet, which may be
    hours later. The claim is a name in the abstract socket namespace of this host: nothing of it is left, however the
    process ends. Raises ConfigError when another rank of the job has the same card.
    """
    if resolve_device(device).type != "cuda" or _may_share(environment) or not hasattr(socket, "AF_UNIX"):
        return GpuClaim(None)
    visible, number = visible_gpus(), local_rank(environment)
    index = bound_index(number, visible)
    card = card_of(index)
    job = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(f"\0kdscale-gpu-{hashlib.sha256(f'{job} {card}'.encode()).hexdigest()}")
    except OSError as error:
        held.close()
        raise ConfigError(
            f"the GPU of local rank {number}",
            expected="one GPU for each rank of this host: NCCL refuses two ranks on one",
            got=f"cuda:{index} of {visible} visible{_visible_says(environment)}, card {card}, which another rank has",
            hint="start as many ranks on a host as it has GPUs (--slots, `slots=` of the hostfile, ntasks-per-node); "
            f"for slices of one MIG card NCCL 2.31 and newer need {_SHARED_CARD}=1",
        ) from error
    return GpuClaim(held)


def card_of(index: int) -> str:
    """What NCCL knows a GPU by: its place on the PCI bus, which the slices of a MIG card share."""
    card = torch.cuda.get_device_properties(index)
    place = [getattr(card, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    if None in place:  # an older torch
        return str(getattr(card, "uuid", index))
    domain, bus, slot = place
    return f"{domain:04x}:{bus:02x}:{slot:02x}"


def local_rank(environment: Mapping[str, str]) -> int:
    """This process's number among the ranks of its host; 0 where no launcher says otherwise."""
    return int(environment.get("LOCAL_RANK", "0"))


def _may_share(environment: Mapping[str, str]) -> bool:
    return environment.get(_SHARED_CARD) == "1"


def _visible_says(environment: Mapping[str, str]) -> str:
    return f" ({VISIBLE}={environment[VISIBLE]})" if VISIBLE in environment else ""
