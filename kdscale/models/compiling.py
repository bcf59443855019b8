"""Decoder layers compiled by torch.compile: the element-wise work between two products becomes one kernel.

Each layer is compiled by itself, and all layers of a kind share the code: a model of 30 equal layers is compiled once.
Shapes are constants of that code, so another batch size is compiled anew. Attention within documents stays outside, as
it reads lengths on the host (a graph break), and so does everything that is hooked onto a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from kdscale.models.attention import attend_outside_graphs

BACKEND = "inductor"
# Kinds of layers × (student in training, student measured, teacher) × shapes of a batch; torch gives up after 8.
_MOST_VERSIONS = 128


class _Switch:
    """For all threads: those of the backward run layers again."""

    off = False


def compile_layers(model: Any) -> int:
    """Compile the decoder layers of a transformers model, each when it first runs; returns how many there are.

    None are found in a model whose layers are not transformers' own. Call it before anything is hooked onto the layers'
    modules: hooks inside a layer are not called.
    """
    _settle_torch()
    attend_outside_graphs()
    layers = decoder_layers(model)
    for layer in layers:
        layer_class: Any = type(layer)
        layer.__class__ = _compiled(layer_class, BACKEND)
    return len(layers)


def _settle_torch() -> None:
    """Settings that torch.compile has for the whole process only."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    dynamo.cache_size_limit = max(dynamo.cache_size_limit, _MOST_VERSIONS)
    # of the ranks of a machine each would start 32 processes
    inductor.compile_threads = min(inductor.compile_threads or 1, torch.get_num_threads())
    # Kernels that are chosen by timing them differ in rounding from one start to the next. Older torch has no such
    # setting; it keeps its choices in a folder of the machine.
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers repeats, in order: those for which it can recompute activations."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run all layers as they were before `compile_layers` within the block, so that hooks inside them are called."""
    before, _Switch.off = _Switch.off, True
    try:
        yield
    finally:
        _Switch.off = before


@cache
def _compiled(layer_class: Any, backend: str) -> Any:
    """A subclass whose forward is compiled. transformers' own recomputing of activations stays around it."""
    compiled = torch.compile(layer_class.forward, backend=backend, dynamic=False)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (layer_class.forward if _Switch.off else compiled)(self, *args, **kwargs)

    return type(layer_class.__name__, (layer_class,), {"forward": forward, "__module__": layer_class.__module__})
