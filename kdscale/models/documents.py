"""Which runs of a micro-batch's positions are one document: what attention keeps apart.

Documents are packed into rows, and their position ids restart. Where a position does not follow the one before it, or a
row begins, another document does. Their bounds are found on the host, where the loader made the positions, so that no
layer has to wait for a device to learn them, and no mask of S × S positions is ever made.

B sequences, S positions, T = B·S positions one row after another, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """`lengths` of all documents, row after row, on the host; `bounds_D1`: where they begin and end in T, int32.

    `made` keeps what a backend derives from them, so that all layers share it.
    """

    lengths: tuple[int, ...]
    bounds_D1: Tensor
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, position_ids_BS: Tensor) -> Documents:
        """From position ids. It waits for a device that they are on: give it those that the loader made."""
        on_host_BS = position_ids_BS.cpu()
        begins_BS = torch.ones_like(on_host_BS, dtype=torch.bool)
        begins_BS[:, 1:] = on_host_BS[:, 1:] != on_host_BS[:, :-1] + 1
        bounds_D1 = torch.cat([begins_BS.flatten().nonzero().squeeze(1), torch.tensor([on_host_BS.numel()])])
        return cls(tuple(bounds_D1.diff().tolist()), bounds_D1.int())

    def to(self, device: torch.device) -> Documents:
        """The same with the bounds on `device`."""
        return Documents(self.lengths, self.bounds_D1.to(device, non_blocking=True))

    @property
    def longest(self) -> int:
        """Positions of the longest document."""
        return max(self.lengths)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(how many, their length) of neighbours of equal length, in order."""
        for length, run in groupby(self.lengths):
            yield len(list(run)), length

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made for the first layer that asks for `key`."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]
