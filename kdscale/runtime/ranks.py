"""Which process this is, and what it shares with the others. One process without a launcher is simply rank 0 of 1.

Ranks exchange tensors and JSON only: whoever reaches a rank's port must not be able to send it a pickle, which is code.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from kdscale.errors import ERRORS_BY_CODE, KdscaleError, MachineError, SelfCheckError
from kdscale_launch.watchdog import beat, progress

T = TypeVar("T")

_MOST_BYTES = 1 << 26
_ARRIVED, _PROGRESS = "kdscale/arrived", "kdscale/progress"  # counts over all ranks, in the group's store
_ROUND_SECONDS = 0.5
_last_call: tuple[Any, int] = (None, 0)  # see _next_call


def join_launched_group(backend: str, device: torch.device, timeout: timedelta | None = None) -> None:
    """Join the group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `timeout` of its collectives (None: torch's).

    `device` is this rank's. torch's own store listens on every address of the machine; here rank 0 listens on
    MASTER_ADDR alone. Raises MachineError when it cannot.
    """
    from kdscale_launch.job import LaunchError
    from kdscale_launch.rendezvous import listen_as_rank_0

    if device.type == "cuda":
        # A partitioned teacher has a communicator of its own, and two must start their kernels in one order on every
        # GPU. All ranks call them in one order (a test records it); this makes NCCL (2.26 on) keep it on the device.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens already
        init_group(backend, device, timeout=timeout)
        return
    number, ranks, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listener = None
    if number == 0:
        try:
            listener = listen_as_rank_0(os.environ).detach()  # the store closes it
        except LaunchError as error:
            hint = "set MASTER_ADDR to an address of rank 0's host and MASTER_PORT to a port that is free on it"
            raise MachineError("the ranks cannot meet", got=str(error), hint=hint) from error
    address, timeout_of_store = os.environ["MASTER_ADDR"], timeout or default_pg_timeout
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, ranks, number == 0, timeout_of_store, master_listen_fd=listener
    )
    init_group(backend, device, store=store, rank=number, world_size=ranks, timeout=timeout)


def init_group(backend: str, device: torch.device, **settings: Any) -> None:
    """torch's init_process_group for a rank that computes on `device`.

    NCCL is told the GPU and so connects at once: ranks that cannot reach each other fail there, and no collective
    guesses a GPU. A group of one keeps traces as they are, without `[rank0]:` before every line.
    """
    hook = sys.excepthook
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None, **settings)
    if dist.get_world_size() == 1:
        sys.excepthook = hook


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


class HostSums:
    """Sums over all ranks of numbers in host memory, in a group of their own: no device waits for them.

    Collective to make and to start; `timeout` is that of each sum (None: torch's).
    """

    def __init__(self, timeout: timedelta | None = None):
        self._group = dist.new_group(backend="gloo", timeout=timeout) if in_group() else None

    def start(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Start to sum `values` and return at once; the call that is returned waits for the sums."""
        sums = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(sums, group=self._group, async_op=True) if self._group is not None else None

        def wait() -> list[float]:
            if work is not None:
                work.wait()
            return sums.tolist()

        return wait


def all_reduce_min(value: int) -> int:
    """The smallest of all ranks' values."""
    if in_group():
        smallest = torch.tensor(value, device=_device())
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)
    return value


def gather(value: Any) -> list[Any]:
    """Every rank's small `value` of plain JSON types, in the order of ranks, on every rank."""
    if not in_group():
        return [value]
    sent = json.dumps(value).encode()
    sizes = [int(size) for size in _all_gather(torch.tensor([len(sent)], device=_device()))]
    padded = torch.zeros(_checked(max(sizes)), dtype=torch.uint8, device=_device())
    padded[: len(sent)] = _as_tensor(sent)
    received = _all_gather(padded)
    return [json.loads(_as_bytes(data[:size])) for data, size in zip(received, sizes, strict=True)]


def place_in_group() -> tuple[int, int]:
    """(this process's number, how many there are) in the group; (0, 1) in none, whatever the environment says."""
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's `rows` in the order of ranks, on every rank's CPU; they differ in their number alone."""
    if not in_group():
        return [rows]
    own = rows.to(_device())
    sizes = [int(size) for size in _all_gather(torch.tensor([len(own)], device=own.device))]
    padded = own.new_zeros((max(sizes), *own.shape[1:]))
    padded[: len(own)] = own
    return [received[:size].cpu() for received, size in zip(_all_gather(padded), sizes, strict=True)]


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0; every rank returns its result, or raises its KdscaleError or OSError.

    The result is of plain JSON types. If rank 0 raised alone, the others would wait for it for ever. They wait as long
    as it makes progress (`unequal_work`).
    """
    if not in_group():
        return function()
    answer: dict[str, Any] = {}
    failure: KdscaleError | OSError | None = None
    with unequal_work():
        if is_main():
            try:
                answer = {"result": function()}
            except KdscaleError as error:
                failure, answer = error, {"exit_code": error.exit_code, "parts": error.parts}
            except OSError as error:
                file = None if error.filename is None else str(error.filename)
                failure, answer = error, {"os_error": [error.errno, error.strerror or str(error), file]}
    answer = _from_main(answer)
    if failure is not None:
        raise failure
    if "parts" in answer:
        raise ERRORS_BY_CODE.get(answer["exit_code"], KdscaleError)(**answer["parts"])
    if "os_error" in answer:
        raise OSError(*answer["os_error"])
    result: T = answer["result"]
    return result


@contextmanager
def unequal_work() -> Iterator[None]:
    """Ranks work for unequal times within the block, and at its end wait for each other: a collective call.

    In a collective of torch's those that wait would be killed in the end, by its time limit or by their watchdogs,
    while another rank writes 200 GB. Here they wait as long as any rank makes progress, and that is progress of theirs.
    A rank that leaves the block by an exception waits for nobody.
    """
    if not in_group():
        yield
        return
    store, call = _next_call()
    ended = threading.Event()
    publisher = threading.Thread(target=_publish_progress, args=(store, ended), name="progress", daemon=True)
    publisher.start()
    try:
        yield
    finally:
        ended.set()
        publisher.join()
    arrived, seen, pause = store.add(_ARRIVED, 1), 0, 0.001
    while arrived < call * world_size():
        time.sleep(pause)
        pause = min(2 * pause, _ROUND_SECONDS)
        arrived, before, seen = store.add(_ARRIVED, 0), seen, store.add(_PROGRESS, 0)
        if seen != before:
            beat()


def _next_call() -> tuple[Any, int]:
    """The store of the group, in which ranks count what they do, and the number of this `unequal_work` in it."""
    global _last_call  # noqa: PLW0603
    store = dist.distributed_c10d._get_default_store()
    number = _last_call[1] + 1 if _last_call[0] is store else 1
    _last_call = (store, number)
    return _last_call


def _publish_progress(store: Any, ended: threading.Event) -> None:
    """In a thread: add to a count of all ranks while this rank's watchdog hears of progress."""
    before = progress()
    while not ended.wait(_ROUND_SECONDS):
        if (now := progress()) != before:
            before = now
            store.add(_PROGRESS, 1)


def _from_main(value: Any) -> Any:
    """Rank 0's `value` of plain JSON types, on every rank."""
    sent = json.dumps(value).encode() if is_main() else b""
    size = torch.tensor([len(sent)], device=_device())
    dist.broadcast(size, 0)
    data = _as_tensor(sent) if is_main() else torch.empty(_checked(int(size)), dtype=torch.uint8, device=_device())
    dist.broadcast(data, 0)
    return json.loads(_as_bytes(data))


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor of this shape."""
    received = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(received, tensor)
    return received


def _device() -> str:
    """Where the group's backend wants its tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device())


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _checked(size: int) -> int:
    """The size of a message from another rank. Raises SelfCheckError when no rank of ours would send it."""
    if not 0 < size <= _MOST_BYTES:
        raise SelfCheckError("a message between ranks", expected=f"1 to {_MOST_BYTES:,} bytes", got=f"{size:,}")
    return size
