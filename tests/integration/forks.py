"""Ranks as forks of one process that has imported everything: seconds instead of a torch import a rank."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch


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


def _run(work: Callable[[int], int | None], rank: int) -> int:
    code = 1
    try:
        # Makes torch's thread pool anew while there is one thread. Left to the first operations, which gloo's threads
        # begin at the same time, two of them meet in it: "Invalid thread pool!".
        torch.set_num_threads(1)
        code = work(rank) or 0
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code
