"""Timing of one shape: random weights of that shape, decoded and prefilled on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdscale.families import Dims, Family
from kdscale.families.cuttable import ending_well
from kdscale.prune.search.latency import Timing

_REPEATS, _DECODED_TOKENS = 5, 6
_MIN_WEIGHT_BYTES = 128 << 20  # more than the last-level cache of most processors


def measurer(
    config: Mapping[str, Any], family: Family, *, device: Any, dtype: Any, context_tokens: int
) -> Callable[[Dims], Timing]:
    """A function that times one shape on `device` in `dtype`, for `LatencyModel`."""
    return lambda dims: _time_shape(dict(config), family, dims, device, dtype, context_tokens)


def machine_name(device: Any, dtype: Any, threads: int, context_tokens: int) -> str:
    """What timings depend on besides the shape: only timings under the same name can be compared."""
    import platform

    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{platform.node()} {name}, {threads} threads, {dtype}, torch {torch.__version__}, {context_tokens} tokens"


def _time_shape(
    config: dict[str, Any], family: Family, dims: Dims, device: Any, dtype: Any, context_tokens: int
) -> Timing:
    import torch

    per_layer = sum(math.prod(s.shape) for s in family.layer_tensors(_cut(config, family, dims, 1), 0).values())
    wanted = -(-_MIN_WEIGHT_BYTES // (per_layer * dtype.itemsize))
    full = min(family.dims(config).layers, max(2, wanted))
    half = max(1, full // 2)
    model = _random_model(_cut(config, family, dims, full), device, dtype)
    parent_path, _, leaf = family.sites.layers.rpartition(".")
    parent, layers = model.get_submodule(parent_path), list(model.get_submodule(family.sites.layers).children())
    ids_1S = torch.randint(dims.vocab, (1, context_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[int, list[tuple[float, float]]] = {full: [], half: []}
    for repeat in range(_REPEATS + 1):
        for count in sorted({full, half}):
            setattr(parent, leaf, torch.nn.ModuleList(layers[:count]))
            model.config.num_hidden_layers = count
            timed = _time_once(model, ids_1S)
            if repeat:  # the first one warms up
                seconds[count].append(timed)
    return _timing(seconds, full, half)


def _timing(seconds: Mapping[int, Sequence[tuple[float, float]]], full: int, half: int) -> Timing:
    """From the seconds (prefill, decode) of each repeat with `full` and with `half` of the layers."""
    layer, rest, spread = {}, {}, {}
    for index, kind in enumerate(("prefill", "decode")):
        full_times = [1000 * pair[index] for pair in seconds[full]]
        low, _, high = statistics.quantiles(full_times, n=4)
        # The fastest repeat: what else runs on the machine only ever adds time, and other shapes were timed in other
        # minutes.
        full_time, half_time = min(full_times), min(1000 * pair[index] for pair in seconds[half])
        # Even so the difference can drown in noise; a layer still takes part of the time.
        difference = (full_time - half_time) / (full - half) if full > half else full_time
        layer_time = max(difference, 0.2 * full_time / full)
        layer[kind] = min(layer_time, full_time / full)
        rest[kind] = full_time - full * layer[kind]
        spread[kind] = (high - low) / full_time
    return Timing(layer, rest, spread)


def _time_once(model: Any, ids_1S: Any) -> tuple[float, float]:
    """(seconds of the prompt, seconds of one token after it), as the evaluation defines them."""
    from kdscale.models.generation.times import PlainDecoder, time_generation

    times = time_generation(PlainDecoder(model), ids_1S, _DECODED_TOKENS)
    return times.first_token, sum(times.gaps) / len(times.gaps)


def _cut(config: dict[str, Any], family: Family, dims: Dims, layers: int) -> dict[str, Any]:
    """The config of a model of this shape with only its first layers of the kind that it has most of.

    The other layers fill up where those are too few.
    """
    kinds = family.layer_kinds(config)
    usual = max(dict.fromkeys(kinds), key=kinds.count)
    order = sorted(range(len(kinds)), key=lambda layer: kinds[layer] != usual)
    kept = ending_well(family, config, sorted(order[:layers]))
    student = family.student_config(config, dims.replace(layers=layers), kept)
    return family.language(student)


def _random_model(config: dict[str, Any], device: Any, dtype: Any) -> Any:
    """A model whose parameters all repeat one block of small random numbers, which is quick to fill."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from kdscale.models.loading import built_config

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(built_config(config), dtype=dtype, attn_implementation="sdpa")
    block = (0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    filled = {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        filled[name] = block.repeat(-(-count // block.numel()))[:count].view(parameter.shape)
    model.load_state_dict(filled, strict=False, assign=True)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)
