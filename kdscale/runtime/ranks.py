"""Which process this is. One process without a launcher is simply rank 0 of 1."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kdscale.errors import KdscaleError

T = TypeVar("T")


def rank() -> int:
    """This process's number in the group, or in the environment that a launcher set; 0 without either."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes work on the job."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def in_group() -> bool:
    """Whether several ranks work together here, whatever the environment says."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_writer() -> bool:
    """Whether this process writes the results: the group's rank 0, or a process that is in none."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks; nothing with one."""
    if in_group():
        dist.barrier()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """`value` summed over all ranks, in place; itself with one rank."""
    if in_group():
        dist.all_reduce(value)
    return value


def all_reduce_min(value: int) -> int:
    """The smallest of all ranks' values."""
    if in_group():
        smallest = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)
    return value


def gather(value: Any) -> list[Any]:
    """Every rank's small `value`, in the order of ranks, on every rank."""
    if not in_group():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0; every rank returns its result, or raises its KdscaleError or OSError.

    If rank 0 raised alone, the others would wait for it for ever.
    """
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = function()
        except (KdscaleError, OSError) as error:
            answer[1] = error
    if in_group():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
