"""Host memory for weights that are only read: one copy for all ranks of a host, page-locked where a GPU reads it.

The ranks of a host map one anonymous file (memfd). It needs no room on any disk and disappears with its last user.
Where ranks cannot share (a system other than Linux, or a launcher that sets no LOCAL_RANK) each rank has its own copy.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kdscale.errors import MachineError
from kdscale.runtime.ranks import barrier, gather, rank, world_size

_HINT = "distill.teacher_placement: partitioned needs neither shared nor locked memory"


class HostMemory:
    """`nbytes` zero bytes, `bytes` as a flat uint8 tensor. Making one is a collective call.

    Every rank of a host fills the items of `indices_to_fill(n)` and then calls `wait_until_filled`.
    Raises MachineError when the machine refuses the memory, or refuses to share or to page-lock it.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self._local_rank, self._local_ranks = _local_position()
        if self._local_ranks > 1:
            self._map = _map_shared(nbytes, self._local_rank)
        else:
            self._map = _map(-1, nbytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if device.type == "cuda":
            _page_lock(self.bytes)

    def indices_to_fill(self, count: int) -> range:
        """Which of `count` items this rank has to fill."""
        return range(self._local_rank, count, self._local_ranks)

    def wait_until_filled(self) -> None:
        """Return when every rank has filled its items. A collective call."""
        barrier()


def _local_position() -> tuple[int, int]:
    """(number of this rank on its host, ranks that share the host's memory)."""
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world_size() == 1 or not hasattr(os, "memfd_create") or not 0 <= local_rank < count:
        return 0, 1
    return local_rank, count


@contextmanager
def explain_refusal(what: str, expected: str, hint: str = _HINT) -> Iterator[None]:
    """Turn the operating system's refusal of memory into a MachineError."""
    try:
        yield
    except OSError as error:
        raise MachineError(what, expected=expected, got=str(error), hint=hint) from error


def _map(descriptor: int, nbytes: int) -> mmap.mmap:
    """Map a file, or with descriptor -1 memory of this process alone."""
    with explain_refusal("the teacher does not fit into this host's memory", f"{nbytes:,} bytes"):
        return mmap.mmap(descriptor, nbytes)


def _map_shared(nbytes: int, local_rank: int) -> mmap.mmap:
    """Map the anonymous file that local rank 0 makes; the others open it by the name it has in that rank's /proc."""
    descriptor = None
    if local_rank == 0:
        with explain_refusal("no shared memory for the teacher", f"{nbytes:,} bytes"):
            descriptor = os.memfd_create("kdscale-teacher")
            os.ftruncate(descriptor, nbytes)
    names = gather(f"/proc/{os.getpid()}/fd/{descriptor}" if descriptor is not None else "")
    file = Path(names[rank() - local_rank])
    try:
        if descriptor is not None:
            return _map(descriptor, nbytes)
        what, expected = f"the teacher's memory at {file} cannot be shared", "ranks that can open each other's /proc"
        with explain_refusal(what, expected), file.open("r+b", buffering=0) as stream:
            return _map(stream.fileno(), nbytes)
    finally:
        barrier()  # the name is valid only while local rank 0 has the file open
        if descriptor is not None:
            os.close(descriptor)


def _page_lock(memory: torch.Tensor) -> None:
    """Page-lock, so that the GPU computes while weights are copied to it."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if code:
        raise MachineError(
            "the teacher's host memory cannot be page-locked",
            expected=f"{memory.numel():,} bytes",
            got=f"CUDA error {code}",
            hint=f"raise the limit of locked memory (ulimit -l); {_HINT}",
        )
