"""The process group: what joining it leaves as it was."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from kdscale.runtime.ranks import init_group


@pytest.mark.skipif(dist.is_initialized(), reason="this process is in a group already")
def test_a_group_of_one_puts_no_rank_before_a_trace() -> None:
    hook = sys.excepthook
    store = torch._C._distributed_c10d.HashStore()  # type: ignore[attr-defined]
    init_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert sys.excepthook is hook
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
