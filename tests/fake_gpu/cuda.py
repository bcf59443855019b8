"""A `torch.cuda` without CUDA, and `fake_gpu`, which makes this process see one GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import __future__ as swapping

from kdscale.models import attention_backends
from kdscale.runtime import kernel_backend
from kdscale_kernels import backend
from tests.fake_gpu.calls import modes
from tests.fake_gpu.syncs import Syncs
from tests.fake_gpu.tensors import GPU, forget_pinned

MEMORY = 80 << 30  # bytes that the fake GPU says it has


def _functions(syncs: Syncs) -> dict[str, Any]:
    class Event:
        """Done as soon as it is recorded: nothing here runs later."""

        def __init__(self, enable_timing: bool = False, **_: Any):
            self._at = 0.0

        def record(self, stream: Any = None) -> None:
            self._at = time.perf_counter()

        def elapsed_time(self, other: Event) -> float:
            return (other._at - self._at) * 1000

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            syncs.note("Event.synchronize")

        def wait(self, stream: Any = None) -> None:
            pass

    class Stream:
        """`recorded`: addresses of the tensors that were marked as used on it."""

        def __init__(self, device: Any = None, name: str = "side", **_: Any):
            self.device, self.name = GPU, name
            self.recorded: list[int] = []

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record()
            return event

        def wait_stream(self, other: Any) -> None:
            syncs.streams.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: Any) -> None:
            pass

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            syncs.note("Stream.synchronize")

    stack = [Stream(name="main")]

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        stack.append(stream)
        try:
            yield
        finally:
            stack.pop()

    properties = SimpleNamespace(
        name="Fake GPU", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, gcnArchName="", uuid="fake"
    )
    return {
        "Event": Event,
        "Stream": Stream,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "device_of": lambda tensor: nullcontext(),
        "current_stream": lambda device=None: stack[-1],
        "default_stream": lambda device=None: stack[0],
        "stream": on_stream,
        "synchronize": lambda device=None: syncs.note("cuda.synchronize"),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "max_memory_allocated": lambda device=None: 1 << 20,
        "memory_allocated": lambda device=None: 1 << 20,
        "memory_reserved": lambda device=None: 1 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0),
    }


@contextmanager
def fake_gpu() -> Iterator[Syncs]:
    """One GPU, in this thread and those that it starts, until the block ends; yields what the host has waited for."""
    syncs, run_thread = Syncs(), threading.Thread.run
    refusal = "the fake GPU runs no kernels"

    def run_on_gpu(thread: threading.Thread) -> None:
        with _thread(syncs):
            run_thread(thread)

    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # tiny tensors: threads would wait for each other
        stack.callback(swapping.set_swap_module_params_on_conversion, swapping.get_swap_module_params_on_conversion())
        swapping.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as with real devices
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in _functions(syncs).items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(threading.Thread, "run", run_on_gpu)
        patch.setattr(backend, "_triton_obstacle", lambda on_gpu: refusal)
        patch.setattr(kernel_backend, "launch_obstacle", lambda gpu: refusal)  # no process for a trial that must fail
        last = attention_backends.BACKENDS[-1]
        patch.setattr(attention_backends, "_trial", lambda one, *_: "" if one is last else refusal)
        stack.callback(backend.refuse_compiled, None)  # an engine in the block finds that Triton cannot launch
        stack.callback(_forget_answers)
        stack.callback(forget_pinned)
        stack.enter_context(_thread(syncs))
        yield syncs


@contextmanager
def _thread(syncs: Syncs) -> Iterator[None]:
    """What each thread needs of its own. C++ gives each device's backward a thread, and this one has none."""
    with ExitStack() as stack:
        for mode in modes(syncs):
            stack.enter_context(mode)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def _forget_answers() -> None:
    """transformers remembers whether there is a GPU, and kdscale what its attention can run on one."""
    from transformers.utils import import_utils

    attention_backends.choose.cache_clear()
    for value in vars(import_utils).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
