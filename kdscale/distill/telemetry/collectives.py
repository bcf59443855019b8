"""Seconds this rank spends in collectives, without waiting for the device and without a profiler.

On a CPU: from the call of a collective to its result, as the calling thread sees it. On a GPU: the same as the calling
stream sees it, from two events around the call (and around a later `wait`), read after the step's host sync. Waiting
for slower ranks is part of it; what a stream of its own hides behind computation is too, where that stream calls.

Imports deepspeed because its collectives go through a backend object that takes torch's functions when it is made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_NAMES = (
    "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "all_gather",
    "all_gather_into_tensor", "all_to_all", "all_to_all_single", "barrier", "all_gather_object",
    "broadcast_object_list",
)  # fmt: skip


_DEEPSPEED_NAMES = (*_NAMES, "all_gather_base", "all_gather_coalesced", "all_reduce_coalesced", "inference_all_reduce")


class CollectiveTimer:
    """`with timer.installed():` around the training; `seconds()` reads and forgets what was measured since."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._inside = threading.local()  # a collective made of others counts once; autograd has threads of its own

    def seconds(self) -> float:
        """Since the last call. On a GPU the caller has already waited for the device; a span that another stream has
        not finished yet is counted next time."""
        spans, self._spans = self._spans, []
        if not self._cuda:
            return float(sum(after - before for before, after in spans))
        done = [span[1].query() for span in spans]
        self._spans += [span for span, over in zip(spans, done, strict=True) if not over]
        return sum(span[0].elapsed_time(span[1]) for span, over in zip(spans, done, strict=True) if over) / 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with every call measured; a handle that it returns is measured when it is waited for."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return function(*args, **kwargs)
            self._inside.yes = True
            before = self._now()
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside.yes = False
                self._spans.append((before, self._now()))
            return _Handle(result, self) if hasattr(result, "wait") else result

        return call

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Measure torch.distributed's collectives and DeepSpeed's, in this process, until the block ends."""
        from deepspeed.comm import comm

        kept: list[tuple[Any, str, Any]] = []
        for name in _NAMES:
            kept.append((dist, name, getattr(dist, name)))
            setattr(dist, name, self.timed(getattr(dist, name)))
        backend = comm.cdb
        mine = [name for name in _DEEPSPEED_NAMES if backend is not None and hasattr(backend, name)]
        for name in mine:
            setattr(backend, name, self.timed(getattr(backend, name)))
        try:
            yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)
            for name in mine:
                delattr(backend, name)  # the class's own method shows again


class _Handle:
    """A collective under way; everything but the measured `wait` is the library's own object."""

    def __init__(self, handle: Any, timer: CollectiveTimer):
        self._handle = handle
        self.wait = timer.timed(handle.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
