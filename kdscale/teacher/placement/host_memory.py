"""Host memory for weights that are only read: one copy for all ranks of a host, page-locked where a GPU reads it.

The ranks of one host map one anonymous file (memfd), which is gone with its last user and needs no room on any disk.
Where that cannot be (another system than Linux, or a launcher that says nothing of local ranks) each rank has its own.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
import torch.distributed as dist

from kdscale.errors import CheckpointError
from kdscale.runtime.ranks import barrier, rank, world_size


class HostMemory:
    """`nbytes` zero bytes, `bytes` as a flat uint8 tensor. Making one is a collective call.

    Every rank of a host fills what it finds in `mine(n)` and then calls `ready`.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self._local, self._locals = _place()
        self._map = _shared(nbytes, self._local) if self._locals > 1 else mmap.mmap(-1, nbytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if device.type == "cuda":
            _lock(self.bytes)

    def mine(self, count: int) -> range:
        """Which of `count` things this rank has to fill."""
        return range(self._local, count, self._locals)

    def ready(self) -> None:
        """Return when every rank has filled its part."""
        barrier()


def _place() -> tuple[int, int]:
    """(number of this rank on its host, ranks that share the host's memory)."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world_size() == 1 or not hasattr(os, "memfd_create") or not 0 <= local < count:
        return 0, 1
    return local, count


def _shared(nbytes: int, local: int) -> mmap.mmap:
    """A mapping of the file that local rank 0 makes; the others open it under its process's name."""
    made = os.memfd_create("kdscale-teacher") if local == 0 else None
    if made is not None:
        os.ftruncate(made, nbytes)
    names: list[str] = [""] * world_size()
    dist.all_gather_object(names, f"/proc/{os.getpid()}/fd/{made}" if made is not None else "")
    leader = Path(names[rank() - local])
    try:
        if made is None:
            with leader.open("r+b", buffering=0) as stream:
                return mmap.mmap(stream.fileno(), nbytes)
        return mmap.mmap(made, nbytes)
    except OSError as error:
        raise CheckpointError(
            f"the teacher's memory at {leader} cannot be shared",
            expected="ranks of one host that see each other's processes",
            got=str(error),
            hint="distill.teacher_placement: partitioned needs no shared memory",
        ) from error
    finally:
        barrier()  # the name is good while its maker has the file open
        if made is not None:
            os.close(made)


def _lock(memory: torch.Tensor) -> None:
    """Page-lock, so that copies to the GPU run beside it."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if code:
        raise CheckpointError(
            "the teacher's host memory cannot be page-locked",
            expected=f"{memory.numel():,} bytes",
            got=f"CUDA error {code}",
            hint="raise the limit of locked memory (ulimit -l), or use distill.teacher_placement: partitioned",
        )
