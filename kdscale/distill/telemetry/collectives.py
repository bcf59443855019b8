"""Seconds that this rank spends in collectives, measured without waiting for the device and without a profiler.

On a CPU: from the call of a collective to its result, as the calling thread sees it. On a GPU: the same as the calling
stream sees it, from two events around the call (and around a later `wait`), read after the step's host sync. Waiting
for slower ranks counts; so does a collective on a stream of its own, even when computation hides it.

DeepSpeed's collectives are wrapped too: its backend object took torch's functions before these were wrapped.
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
    """Measures collectives `with timer.installed()`; `seconds()` returns the time since its last call."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._inside = threading.local()  # a collective made of others counts once; autograd has threads of its own

    def seconds(self) -> float:
        """Seconds since the last call. On a GPU the caller has already waited for the device; a span that another
        stream has not finished yet is counted next time."""
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
        """`function` with every call measured, and with it the `wait` of a handle that it returns."""

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

        originals = {name: getattr(dist, name) for name in _NAMES}
        for name, function in originals.items():
            setattr(dist, name, self.timed(function))
        backend = comm.cdb
        methods = [name for name in _DEEPSPEED_NAMES if backend is not None and hasattr(backend, name)]
        for name in methods:
            setattr(backend, name, self.timed(getattr(backend, name)))
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(dist, name, function)
            for name in methods:
                delattr(backend, name)  # uncovers the method of its class


class _Handle:
    """A collective under way; everything but the measured `wait` is the library's own object."""

    def __init__(self, handle: Any, timer: CollectiveTimer):
        self._handle = handle
        self.wait = timer.timed(handle.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
