"""Filling part of a transformers model with tensors as they are on disk, and taking out the parts not wanted.

B batch · S sequence · D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.errors import DataError
from kdscale.families import TensorSpec


def assemble(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Parameter name → tensor, from name on disk → spec.

    Tensors of one parameter are put together along the first dimension in their order; those of the experts of a
    mixture, which are apart on disk and one tensor in the model, are then stacked.
    """
    pieces: dict[str, dict[int | None, list[str]]] = {}
    for name, spec in specs.items():
        pieces.setdefault(spec.parameter, {}).setdefault(spec.expert, []).append(name)
    out: dict[str, Tensor] = {}
    for parameter, by_expert in pieces.items():
        whole = [
            read(names[0]) if len(names) == 1 else torch.cat([read(n) for n in names]) for names in by_expert.values()
        ]
        out[parameter] = whole[0] if None in by_expert else torch.stack(whole)
    return out


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def enter_with(hidden_BSD: Tensor) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A pre-hook of the first layer that hands it this hidden state, whatever the model made of its embeddings.

    Multipliers and learned positions belong before the first layer only, and a shell runs any layer as its first.
    """

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden_BSD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BSD}

    return hook


class NoPositions(nn.Module):
    """In place of a table of learned positions, where the hidden state has them already."""

    def forward(self, position_ids_BS: Tensor) -> Tensor:
        return torch.zeros(1, device=position_ids_BS.device)


def check_positions(table: str, spec: TensorSpec, position_ids: Sequence[Tensor]) -> None:
    """Raises DataError for a position beyond the learned ones: the look-up would end in an index error."""
    longest = max((int(ids_BS.max()) for ids_BS in position_ids), default=0)
    if longest >= spec.shape[0]:
        raise DataError(
            f"a sequence is longer than the {spec.shape[0]} positions of {table}",
            expected=f"at most {spec.shape[0]} tokens",
            got=f"{longest + 1} tokens",
            hint="lower importance.seq_len",
        )
