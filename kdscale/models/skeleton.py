"""A transformers model without its weights, for a process that keeps only a part of them.

The module tree is real, its buffers too (read where they are stored, else computed as the constructor does it, rotary
frequencies in fp32); its
parameters are on the meta device, and a ParameterReader reads any range of any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdscale.errors import CheckpointError
from kdscale.models.head import OutputHead, head_of
from kdscale.models.loading import model_on_meta
from kdscale.models.parameter_map import ParameterReader


def build_skeleton(weights: ParameterReader, *, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Build the causal LM that `load_model` would load, in eval mode, with parameters on the meta device, heads tied.

    Raises CheckpointError when a parameter is not in the checkpoint, or would not be in `dtype`.
    """
    path = weights.checkpoint.path
    model: Any = model_on_meta(path, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    wrong = sorted(set(parameters) ^ weights.names())
    wrong += [name for name, value in parameters.items() if name not in wrong and value.numel() != weights.numel(name)]
    wrong += [name for name, value in parameters.items() if value.dtype != dtype]
    if wrong or (dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None)):
        raise CheckpointError(
            f"{path} cannot be loaded in parts",
            expected=f"every parameter in the checkpoint and in {str(dtype).removeprefix('torch.')}",
            got=", ".join(wrong[:8]) or "modules that transformers keeps in float32",
        )
    stored, buffers = weights.buffers(), dict(model.named_buffers())
    with torch.no_grad():
        for name, value in stored.items():
            buffers[name].copy_(value)
    return model.eval()


def load_head(path: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> OutputHead:
    """The head of a checkpoint, of which nothing else is read. Raises CheckpointError."""
    weights = ParameterReader.open(path)
    model = build_skeleton(weights, dtype=dtype, trust_remote_code=trust_remote_code)
    head_of(model)  # refuses a model without one
    names = {id(value): name for name, value in model.named_parameters()}
    linear = model.get_output_embeddings()
    for attribute, value in linear._parameters.items():
        if value is not None:
            read = torch.empty(value.shape, dtype=dtype)
            weights.fill(names[id(value)], 0, read.view(-1))
            linear._parameters[attribute] = torch.nn.Parameter(read.to(device), requires_grad=False)
    return head_of(model).detached()


def replace_parameters(
    model: torch.nn.Module, make: Callable[[torch.nn.Parameter], torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """Replace every parameter by `make(meta parameter)`, tied ones by the same; returns the new ones by name."""
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


def move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Move every buffer of `model` (rotary frequencies and the like) to `device`; parameters stay where they are."""
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else value.to(device)
