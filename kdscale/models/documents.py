"""Which runs of a micro-batch's positions are one document: what attention and recurrent mixers keep apart.

Documents are packed into rows, and their position ids restart. Where a position does not follow the one before it, or a
row begins, another document does. Their bounds are found on the host, where the loader made the positions, so that no
layer has to wait for a device to learn them, and no mask of S × S positions is ever made.

A mixer with a state (Mamba 2, gated delta rule, short convolution) has no mask to keep documents apart: what it
remembers of one would run on into the next. It is run document by document instead.

B sequences, S positions, T = B·S positions one row after another, D documents, H hidden size, U width of a mixer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn


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

    def in_chunks(self, size: int) -> Documents:
        """Each cut into pieces of `size` positions and a rest, which attention in chunks keeps apart as well."""
        chunks: Documents = self.once(("chunks", size), lambda: self._in_chunks(size))
        return chunks

    def _in_chunks(self, size: int) -> Documents:
        lengths = [min(size, length - begin) for length in self.lengths for begin in range(0, length, size)]
        bounds_D1 = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return Documents(tuple(lengths), bounds_D1.to(self.bounds_D1.device))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, made for the first layer that asks for `key`."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def recurrent_mixers(model: nn.Module) -> list[nn.Module]:
    """The modules that carry a state from position to position: all of them begin with a causal depthwise conv1d."""
    return [module for module in model.modules() if any(map(_is_depthwise, module.children()))]


def mix_within_documents(model: nn.Module) -> None:
    """Let the recurrent mixers of `model` begin anew with each document in forwards that are given `documents`."""
    for module in recurrent_mixers(model):
        if not isinstance(module, _ByDocument):
            mixer: Any = type(module)
            module.__class__ = _by_document(mixer)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1


class _ByDocument(nn.Module):
    """Stands before a mixer's own class. Neighbouring documents of equal length go through it as one batch.

    The projection at its end knows no documents. It is called once, with whole rows, as who hooks onto it expects.
    """

    out_proj: nn.Module

    def forward(
        self, hidden_states: Tensor, *args: Any, documents: Documents | None = None, record: Any = None, **kwargs: Any
    ) -> Tensor:
        """As the mixer's own forward, [B, S, H]; without `documents` nothing is kept apart. `record` is attention's."""
        if documents is None:
            mixed_BSH: Tensor = super().forward(hidden_states, *args, **kwargs)
            return mixed_BSH
        assert kwargs.get("attention_mask") is None and kwargs.get("ulysses") is None, "whole rows without padding"
        rows_TH, begin, mixed = hidden_states.flatten(0, 1), 0, list[Tensor]()
        projection, later = self.out_proj, _Later(self.out_proj)
        self.__dict__["out_proj"] = later  # found before the module's own
        try:
            for count, length in documents.runs():
                run_TH = rows_TH[begin : begin + count * length]
                mixed.append(super().forward(run_TH.unflatten(0, (count, length)), *args, **kwargs).flatten(0, 1))
                begin += count * length
        finally:
            del self.__dict__["out_proj"]
        mixed_BSU = torch.cat(mixed).unflatten(0, hidden_states.shape[:2])
        out_BSH: Tensor = projection(mixed_BSU) if later.passed else mixed_BSU
        return out_BSH


class _Later(nn.Module):
    """Stands for a mixer's last projection and passes on what that is to be given; `passed`: whether it was called.

    A fused kernel reads weight and bias instead, and calls nothing.
    """

    def __init__(self, projection: nn.Module):
        super().__init__()
        self.__dict__.update(weight=projection.weight, bias=projection.bias, passed=False)

    def forward(self, mixed: Tensor) -> Tensor:
        self.__dict__["passed"] = True
        return mixed


@cache
def _by_document(mixer: type[nn.Module]) -> Any:
    """The class of a mixer with `_ByDocument` before it, outside compiled code: it reads lengths on the host."""
    forward = torch.compiler.disable(_ByDocument.forward, reason="documents have lengths on the host")
    return type(mixer.__name__, (_ByDocument, mixer), {"__module__": mixer.__module__, "forward": forward})
