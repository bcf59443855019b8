"""Joining and leaving the process group of a distillation."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from kdscale.errors import ConfigError
from kdscale.runtime.ranks import barrier, init_group, join_launched_group, world_size
from kdscale.runtime.versions import check_deepspeed


def join_group(device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the launcher's group, or make one of a single process that needs no port; `timeout` of its collectives.

    Raises MachineError for a DeepSpeed that is too old.
    """
    check_deepspeed()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops

    # On a CPU DeepSpeed would compile an extension at every start: a minute, a compiler, a lock that outlives a kill.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # A launcher sets all three; job systems and other libraries leave a stray RANK behind.
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            join_launched_group(backend, device, timeout)
        else:
            store = torch._C._distributed_c10d.HashStore()  # in memory: no port, nothing to collide with
            init_group(backend, device, store=store, rank=0, world_size=1)
    if world_size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's engine insists on it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def check_world(processes: int) -> None:
    """Raises ConfigError when the group has another number of ranks than distill.processes."""
    if world_size() != processes:
        raise ConfigError(
            "distill.processes",
            expected=f"{processes} processes",
            got=f"{world_size()} in the group (WORLD_SIZE)",
            hint="start as many ranks as the config says",
        )


def leave_group() -> None:
    """Leave the group; call at the end of a process, then leave it with os._exit.

    A plain exit was seen to abort ("terminate called without an active exception") now and then after all was done.
    """
    if dist.is_initialized():
        import deepspeed

        barrier()
        deepspeed.comm.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


def has_async_io() -> bool:
    """Whether DeepSpeed can build its asynchronous reader and writer of NVMe."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))
