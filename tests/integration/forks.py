"""Ranks as forks of one process that has imported everything: seconds instead of a torch import a rank."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
from torch.distributed import distributed_c10d

# What an engine and a model import on their way, and all that these import: more than three seconds a rank.
_BY_AN_ENGINE = (
    "deepspeed.module_inject.layers",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.original_muon",
    "kdscale.distill.objectives.token_divergence",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)


def import_engine() -> None:
    """Import what a distillation does, once for all forks."""
    for name in _BY_AN_ENGINE:
        importlib.import_module(name)
    gc.freeze()  # or each fork looks through all of it, and so copies its pages


def fork_ranks(world: int, work: Callable[[int], int | None], expected: int = 0) -> list[int]:
    """Run `work(rank)` in `world` forks; returns their exit codes (None counts as 0), by rank.

    When one ends with another code than `expected`, those that would wait for it are killed.
    """
    ranks: dict[int, int] = {}
    for rank in range(world):
        child = os.fork()
        if not child:
            os._exit(_run(work, rank))
        ranks[child] = rank
    codes: dict[int, int] = {}
    while len(codes) < world:
        child, status = os.waitpid(-1, 0)
        codes[ranks[child]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[child]] != expected:
            for other, rank in ranks.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in range(world)]


def _refuse_to_pickle(*_: object) -> NoReturn:
    """Whoever can send a pickle to a rank can run code there: neither ours nor DeepSpeed's collectives may take one."""
    raise AssertionError("a rank was about to send a pickle to the others")


def _run(work: Callable[[int], int | None], rank: int) -> int:
    code = 1
    try:
        # Makes torch's thread pool anew while there is one thread. Left to the first operations, which gloo's threads
        # begin at the same time, two of them meet in it: "Invalid thread pool!".
        torch.set_num_threads(1)
        distributed_c10d._update_default_pg(None)  # of an engine that the parent made: it is no rank of that group
        distributed_c10d._object_to_tensor = _refuse_to_pickle  # type: ignore[assignment]
        code = work(rank) or 0
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code
