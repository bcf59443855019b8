"""Optimiser state that lives on NVMe: one sub-group of it in memory at a time, through DeepSpeed's own swapper.

DeepSpeed 0.19, stage 3. Sub-groups below its smallest transfer (1 MiB) stay in memory and need nothing. Looks into the
engine's objects and imports nothing of DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Swapped:
    """The flat fp32 buffers of `zero` that are on NVMe between steps; none where nothing is swapped."""

    def __init__(self, zero: Any):
        self._zero = zero
        buffers = zero.fp32_partitioned_groups_flat if getattr(zero, "swap_optimizer", False) else []
        self._groups = {
            id(buffer): group for group, buffer in enumerate(buffers) if zero._swappable_optimizer_subgroup(group)
        }

    @contextmanager
    def there(self, buffer: torch.Tensor, write: bool = False) -> Iterator[None]:
        """Have `buffer` and its moments in memory; with `write` they go back to the disk as the block leaves them."""
        group = self._groups.get(id(buffer))
        if group is None:
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        except BaseException:
            self._zero._release_swap_buffers(group)
            raise
        if write:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        else:
            self._zero._release_swap_buffers(group)

    def forget_moments(self) -> None:
        """Moments that are on the disk count no more: others are made."""
        if self._groups:
            self._zero.optimizer_swapper.purge_state()
