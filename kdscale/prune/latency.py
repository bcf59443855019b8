"""Decode and prefill latency of shapes on this machine, without a checkpoint of any of them.

A model of random weights with a few layers of the shape is built and timed with all of them and with half of them: the
difference is the time of a layer, the remainder that of everything else (embedding, norm, head). Enough layers are
taken that their weights do not fit into a processor's cache, which would make decoding look faster than it is. Times of
other shapes come from a non-negative linear model over products of dimensions, fitted to a few spread-out shapes; its
leave-one-out error is the error bar.

R shapes · P features
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdscale.families import Dims, Family
from kdscale.files import read_json, write_json
from kdscale.prune.budget import Floats, Shapes

Kind = Literal["decode", "prefill"]
KINDS: tuple[Kind, Kind] = ("decode", "prefill")
_LAYER_AXES = ("hidden", "ffn", "heads", "kv_heads")
_REPEATS, _DECODED = 5, 6
_MIN_WEIGHT_BYTES = 128 << 20  # more than the last-level cache of most processors
_DESIGN_SHAPES = 8


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one shape at its fastest: `layer` and `rest` by kind; `spread`: interquartile range, a share."""

    layer: dict[str, float]
    rest: dict[str, float]
    spread: dict[str, float]

    def total(self, kind: Kind, layers: int) -> float:
        return self.layer[kind] * layers + self.rest[kind]


class LatencyModel:
    """`budget.Speeds` from timings of a few shapes; `time_shape` measures one (dims → Timing) and is called once each.

    Timings are kept in `cache` (a JSON file) under `machine`, so that the same shapes are not timed again.
    """

    def __init__(self, time_shape: Callable[[Dims], Timing], machine: str, cache: Path | None = None):
        self._time_shape, self._machine, self._cache = time_shape, machine, cache
        self._timed: dict[str, Timing] = {}
        if cache is not None and cache.exists():
            stored = read_json(cache)
            if stored.get("machine") == machine:
                self._timed = {key: Timing(**value) for key, value in stored["shapes"].items()}
        self._known: dict[Dims, Timing] = {}
        self._weights: dict[str, Floats] = {}
        self.error: dict[str, float] = {}

    def timing(self, dims: Dims) -> Timing:
        """Measured now, or before on the same machine."""
        key = f"hidden={dims.hidden} ffn={dims.ffn} heads={dims.heads} kv_heads={dims.kv_heads}"
        key += f" experts={dims.experts}" if dims.experts else ""
        if key not in self._timed:
            self._timed[key] = self._time_shape(dims)
            if self._cache is not None:
                shapes = {name: vars(timing) for name, timing in self._timed.items()}
                write_json(self._cache, {"machine": self._machine, "shapes": shapes})
        self._known[dims] = self._timed[key]
        return self._timed[key]

    def fit(self, teacher: Dims, shapes: Shapes, advance: Callable[[float, str], None] = lambda *_: None) -> None:
        """Time the teacher's shape and a few of `shapes` that differ most, and fit the model to them."""
        features_RP = _features(shapes)
        teacher_P = _features({axis: np.array([getattr(teacher, axis)]) for axis in shapes})
        scale_P = teacher_P[0]
        chosen = _spread_out(features_RP / scale_P, teacher_P[0] / scale_P, _DESIGN_SHAPES - 1)
        designs = [teacher]
        designs += [teacher.replace(**{axis: int(values[i]) for axis, values in shapes.items()}) for i in chosen]
        timings = []
        for dims in designs:
            timings.append(self.timing(dims))
            advance(1, f"hidden {dims.hidden}, ffn {dims.ffn}, heads {dims.heads}")
        design_RP = np.concatenate([teacher_P, features_RP[chosen]])
        for kind in KINDS:
            layer_R = np.array([timing.layer[kind] for timing in timings])
            rest_R = np.array([timing.rest[kind] for timing in timings])
            hidden_R2 = design_RP[:, [0, -1]]
            self._weights[f"{kind}.layer"] = _nonnegative_fit(design_RP / scale_P, layer_R) / scale_P
            self._weights[f"{kind}.rest"] = _nonnegative_fit(hidden_R2 / scale_P[[0, -1]], rest_R) / scale_P[[0, -1]]
            self.error[kind] = _left_out_error(design_RP / scale_P, layer_R)

    def milliseconds(self, kind: Kind, shapes: Shapes) -> Floats:
        """Predicted by the fitted model; of layer shapes that were timed, the timing."""
        features_RP = _features(shapes)
        layer_R = features_RP @ self._weights[f"{kind}.layer"]
        rest_R: Floats = features_RP[:, [0, -1]] @ self._weights[f"{kind}.rest"]
        total_R = rest_R + layer_R * shapes["layers"]
        for dims, timing in self._known.items():
            same_R = np.all([shapes[axis] == getattr(dims, axis) for axis in _LAYER_AXES], axis=0)
            total_R[same_R] = timing.rest[kind] + timing.layer[kind] * shapes["layers"][same_R]
        return total_R


def _features(shapes: Shapes) -> Floats:
    """[R, P]: what a layer's time may be proportional to; the first is 1 and the last the hidden size."""
    hidden, ffn, heads, kv_heads = (shapes[a].astype(np.float64) for a in ("hidden", "ffn", "heads", "kv_heads"))
    columns = [np.ones_like(hidden), hidden * ffn, hidden * heads, hidden * kv_heads, heads, hidden]
    return np.stack(columns, axis=1)


def _spread_out(rows_RP: Floats, first_P: Floats, count: int) -> list[int]:
    """Greedily the rows that add most to det(XᵀX) (D-optimal design); distinct layer shapes only."""
    _, unique = np.unique(rows_RP.round(9), axis=0, return_index=True)
    pool = unique[:: max(1, len(unique) // 2000)]
    inverse_PP = np.linalg.inv(np.outer(first_P, first_P) + 1e-6 * np.eye(len(first_P)))
    chosen: list[int] = []
    while len(chosen) < min(count, len(pool)):
        gain_R = np.einsum("rp,pq,rq->r", rows_RP[pool], inverse_PP, rows_RP[pool])
        gain_R[np.isin(pool, chosen)] = -1
        best = int(pool[int(gain_R.argmax())])
        chosen.append(best)
        row_P = rows_RP[best]
        moved_P = inverse_PP @ row_P
        inverse_PP = inverse_PP - np.outer(moved_P, moved_P) / (1 + row_P @ moved_P)
    return chosen


def _nonnegative_fit(rows_RP: Floats, values_R: Floats) -> Floats:
    """Least squares of relative errors with weights ≥ 0: the most negative weight is dropped until none is."""
    scale_R = 1 / np.maximum(values_R, 1e-6)
    weights_P = np.zeros(rows_RP.shape[1])
    active = list(range(rows_RP.shape[1]))
    while active:
        found, *_ = np.linalg.lstsq(rows_RP[:, active] * scale_R[:, None], values_R * scale_R, rcond=1e-9)
        if found.min() >= 0:
            weights_P[active] = found
            break
        active.pop(int(found.argmin()))
    return weights_P


def _left_out_error(rows_RP: Floats, values_R: Floats) -> float:
    """Median relative error of predicting each shape from the others."""
    errors = []
    for out in range(len(values_R)):
        kept = np.arange(len(values_R)) != out
        predicted = float(rows_RP[out] @ _nonnegative_fit(rows_RP[kept], values_R[kept]))
        errors.append(abs(predicted / max(float(values_R[out]), 1e-9) - 1))
    return float(statistics.median(errors))


# ---- measuring: everything below needs torch ----


def measurer(
    config: Mapping[str, Any], family: Family, *, device: Any, dtype: Any, context_tokens: int
) -> Callable[[Dims], Timing]:
    """What `LatencyModel` times shapes with, on `device` in `dtype`."""
    return lambda dims: _time_shape(dict(config), family, dims, device, dtype, context_tokens)


def machine_name(device: Any, dtype: Any, threads: int, context_tokens: int) -> str:
    """Timings are only comparable under the same one."""
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
    most = family.dims(config).layers
    whole = min(most, max(2, wanted))
    half = max(1, whole // 2)
    model = _random_model(_cut(config, family, dims, whole), device, dtype)
    parent_path, _, leaf = family.sites.layers.rpartition(".")
    parent, layers = model.get_submodule(parent_path), list(model.get_submodule(family.sites.layers).children())
    ids_1S = torch.randint(dims.vocab, (1, context_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[int, list[tuple[float, float]]] = {whole: [], half: []}
    for repeat in range(_REPEATS + 1):
        for count in sorted({whole, half}):
            setattr(parent, leaf, torch.nn.ModuleList(layers[:count]))
            model.config.num_hidden_layers = count
            timed = _time_once(model, ids_1S)
            if repeat:  # the first one warms up
                seconds[count].append(timed)
    return _timing(seconds, whole, half)


def _timing(seconds: Mapping[int, Sequence[tuple[float, float]]], whole: int, half: int) -> Timing:
    layer, rest, spread = {}, {}, {}
    for index, kind in enumerate(("prefill", "decode")):
        all_whole = [1000 * pair[index] for pair in seconds[whole]]
        low, _, high = statistics.quantiles(all_whole, n=4)
        # The fastest repeat: what else runs on the machine only ever adds time, and other shapes were timed in other
        # minutes.
        best, halved = min(all_whole), min(1000 * pair[index] for pair in seconds[half])
        # Even so the difference can drown in noise; a layer still takes part of the time.
        one = max((best - halved) / (whole - half), 0.2 * best / whole) if whole > half else best
        layer[kind] = min(one, best / whole)
        rest[kind] = best - whole * layer[kind]
        spread[kind] = (high - low) / best
    return Timing(layer, rest, spread)


def _time_once(model: Any, ids_1S: Any) -> tuple[float, float]:
    """Seconds of the prompt, and of one further token."""
    import torch

    def now() -> float:
        if ids_1S.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        start = now()
        out = model(input_ids=ids_1S, use_cache=True, logits_to_keep=1)
        prefilled = now()
        for _ in range(_DECODED):
            out = model(input_ids=ids_1S[:, :1], past_key_values=out.past_key_values, use_cache=True)
        return prefilled - start, (now() - prefilled) / _DECODED


def _cut(config: dict[str, Any], family: Family, dims: Dims, layers: int) -> dict[str, Any]:
    return family.student_config(config, dims.replace(layers=layers), list(range(layers)))


def _random_model(config: dict[str, Any], device: Any, dtype: Any) -> Any:
    """Built on the meta device; every parameter a repeated block of small random numbers, which is quick to fill."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields), dtype=dtype, attn_implementation="sdpa"
        )
    block = (0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    filled = {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        filled[name] = block.repeat(-(-count // block.numel()))[:count].view(parameter.shape)
    model.load_state_dict(filled, strict=False, assign=True)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)
