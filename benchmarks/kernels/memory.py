"""Peak memory of one call beyond its inputs, without the gradients of hidden states and head that it hands back.

On CUDA the allocator's own count. On a CPU the growth of the resident set (Linux) of a process forked for this one
call, from a parent that has imported everything and computed nothing. What a contestant keeps for its next call counts,
except for those that compile: compilation would count too, so they are called twice and the second call is measured.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from contestants import Contestant, step
from measure import Bench, Setting, attempt, registry, synchronise
from shapes import LossShape

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(contestant: Contestant, setting: Setting) -> tuple[int | None, str]:
    """(bytes, "") or (None, what went wrong)."""
    if setting.device.type == "cuda":
        return attempt(lambda: _cuda(contestant, setting))
    if not _CLEAR.exists():
        return None, f"no peak memory on {sys.platform}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "kdscale_kernels"])
    parent_end, child_end = context.Pipe(duplex=False)
    wanted_key = (contestant.op, *contestant.key)
    child = context.Process(target=_child, args=(child_end, wanted_key, setting))
    child.start()
    child_end.close()
    try:
        return parent_end.recv()
    except EOFError:
        child.join()
        return None, f"failed: the process ended with code {child.exitcode} (killed for memory?)"
    finally:
        child.join()


def _child(pipe: Connection, wanted_key: tuple[str, str, str], setting: Setting) -> None:
    contestant = next(c for c in registry(setting.device) if (c.op, *c.key) == wanted_key)
    pipe.send(attempt(lambda: _cpu(contestant, setting)))


def _status_bytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _cpu(contestant: Contestant, setting: Setting) -> int:
    stage = Bench(setting)
    if contestant.compiled:
        step(contestant, stage.inputs(contestant), setting.direction)
    else:  # threads, imports and generated code, at a size that costs nothing
        v = min(setting.shape.v, 512)
        little = Setting(LossShape(8, setting.shape.h, v, min(setting.shape.k, v)), *_rest(setting))
        step(contestant, Bench(little).inputs(contestant), setting.direction)
    inputs = stage.inputs(contestant)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # forget the peak so far
    before = _status_bytes("VmRSS")
    step(contestant, inputs, setting.direction)
    return max(0, _status_bytes("VmHWM") - before - _handed_back(inputs))


def _rest(setting: Setting) -> tuple[torch.dtype, torch.device, str]:
    return setting.dtype, setting.device, setting.direction


def _cuda(contestant: Contestant, setting: Setting) -> int:
    stage = Bench(setting)
    step(contestant, stage.inputs(contestant), setting.direction)
    inputs = stage.inputs(contestant)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    step(contestant, inputs, setting.direction)
    synchronise(setting.device)
    return torch.cuda.max_memory_allocated(setting.device) - before - _handed_back(inputs)


def _handed_back(inputs: object) -> int:
    """Bytes of dX and dW. The gradient of existing logits counts as memory: whether it needs any is the question."""
    leaves = (inputs.hidden_NH, inputs.weight_VH)  # type: ignore[attr-defined]
    return sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
