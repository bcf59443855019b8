"""A transformers model without its weights, and where each of its parameters lies in the checkpoint's files.

For those who keep only part of a model: the module tree is real, its buffers too (computed as the constructor does it,
rotary frequencies in fp32), its parameters are on the meta device, and any range of any of them can be read alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale.errors import CheckpointError
from kdscale.families import Family, load_family
from kdscale.weights import Checkpoint


@dataclass(frozen=True)
class _Piece:
    """A tensor on disk that is values `begin` to `end` of a parameter."""

    name: str
    begin: int
    end: int


class Weights:
    """A checkpoint by the names of the model's parameters; make one with `Weights.open`.

    A parameter is one tensor on disk or several back to back: those that a family fuses along the first dimension, and
    the experts of a mixture, which the model stacks. Either way its values, in storage order, are theirs in order.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family):
        self.checkpoint, self.family = checkpoint, family
        specs = family.tensors(checkpoint.config)
        by_expert: dict[str, dict[int | None, list[str]]] = {}
        for name, spec in specs.items():
            by_expert.setdefault(spec.parameter, {}).setdefault(spec.expert, []).append(name)
        self._pieces: dict[str, list[_Piece]] = {}
        for parameter, groups in by_expert.items():
            at, pieces = 0, []
            for name in (name for names in groups.values() for name in names):
                end = at + torch.Size(specs[name].shape).numel()
                pieces.append(_Piece(name, at, end))
                at = end
            self._pieces[parameter] = pieces

    @classmethod
    def open(cls, path: Path) -> Weights:
        """Reads headers only. Raises CheckpointError for a family that is not known, for quantised weights, and when
        config.json and the weights disagree."""
        checkpoint = Checkpoint.open(path)
        family = load_family(checkpoint.config, str(path / "config.json"))
        checkpoint.verify_against(family)
        return cls(checkpoint, family)

    def numel(self, parameter: str) -> int:
        return self._pieces[parameter][-1].end if parameter in self._pieces else 0

    def names(self) -> set[str]:
        return set(self._pieces)

    def fill(self, parameter: str, begin: int, out: torch.Tensor) -> None:
        """Values `begin` to `begin + len(out)` of a parameter, in storage order, into the flat `out` in its dtype."""
        end = begin + out.numel()
        for piece in self._pieces[parameter]:
            low, high = max(begin, piece.begin), min(end, piece.end)
            if low < high:
                self.checkpoint.fill(piece.name, low - piece.begin, out[low - begin : high - begin])


def build_skeleton(weights: Weights, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The causal LM that `load_model` would load, in eval mode, its parameters on the meta device, heads tied.

    Raises CheckpointError when a parameter has no place in the checkpoint, or would not be in `dtype`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    path = weights.checkpoint.path
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    found = dict(model.named_parameters())
    wrong = sorted(set(found) ^ weights.names())
    wrong += [name for name, value in found.items() if name not in wrong and value.numel() != weights.numel(name)]
    wrong += [name for name, value in found.items() if value.dtype != dtype]
    if wrong or (dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None)):
        raise CheckpointError(
            f"{path} cannot be loaded in parts",
            expected=f"every parameter in the checkpoint and in {str(dtype).removeprefix('torch.')}",
            got=", ".join(wrong[:8]) or "modules that transformers keeps in float32",
        )
    return model.eval()


def replace_parameters(
    model: torch.nn.Module, make: Callable[[torch.nn.Parameter], torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """Put `make(meta parameter)` in every parameter's place, once for tied ones; returns them by name."""
    made: dict[int, torch.nn.Parameter] = {}
    names = {id(value): name for name, value in model.named_parameters()}
    by_name = {}
    for module in model.modules():
        for attribute, value in list(module._parameters.items()):
            if value is None:
                continue
            if id(value) not in made:
                made[id(value)] = by_name[names[id(value)]] = make(value)
            module._parameters[attribute] = made[id(value)]
    return by_name
