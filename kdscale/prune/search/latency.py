"""Decode and prefill latency of shapes on this machine, without a checkpoint of any of them.

A model of random weights with a few layers of the shape is built and timed with all of them and with half of them: the
difference is the time of a layer, the remainder is the time of everything else (embedding, norm, head). There are
enough layers that their weights do not fit into a processor's cache, which would make decoding look faster than it is.
Times of other shapes come from a non-negative linear model over products of dimensions, fitted to a few shapes that
differ most (D-optimal design); its leave-one-out error is the error bar.

R shapes · P features
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdscale.families import Dims
from kdscale.families.dims import SHAPE_AXES
from kdscale.files import read_own_json, write_json
from kdscale.prune.search.budget import Floats, Shapes

LatencyKind = Literal["decode", "prefill"]
LATENCY_KINDS: tuple[LatencyKind, LatencyKind] = ("decode", "prefill")
_LAYER_AXES = tuple(axis for axis in SHAPE_AXES if axis not in ("layers", "experts"))
_DESIGN_SHAPES = 8


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one shape at its fastest, by latency kind: of a layer and of the rest of the model.

    `spread` is the interquartile range of repeated timings, as a share of the fastest.
    """

    layer: dict[str, float]
    rest: dict[str, float]
    spread: dict[str, float]

    def total(self, kind: LatencyKind, layers: int) -> float:
        """Milliseconds of a model of so many layers."""
        return self.layer[kind] * layers + self.rest[kind]


class TimingFile:
    """Timings of layer shapes on one machine, kept in a JSON file so that no shape is timed twice.

    The timings of another machine (another `machine` name) in the file are ignored. Without a path nothing is kept.
    """

    def __init__(self, machine: str, path: Path | None = None):
        self._machine, self._path = machine, path
        self._timings: dict[str, Timing] = {}
        stored = read_own_json(path, _are_timings) if path is not None else None
        if stored is not None and stored["machine"] == machine:
            self._timings = {key: Timing(**value) for key, value in stored["shapes"].items()}

    def get(self, dims: Dims) -> Timing | None:
        """The timing of a shape with such layers, however many of them."""
        return self._timings.get(_layer_key(dims))

    def add(self, dims: Dims, timing: Timing) -> None:
        """Keep a new timing, also in the file."""
        self._timings[_layer_key(dims)] = timing
        if self._path is not None:
            shapes = {key: vars(known) for key, known in self._timings.items()}
            write_json(self._path, {"machine": self._machine, "shapes": shapes})


def _are_timings(value: Any) -> bool:
    """Whether a JSON value is what `TimingFile` writes."""
    if not isinstance(value, dict) or not isinstance(value.get("shapes"), dict) or "machine" not in value:
        return False
    fields = set(Timing.__dataclass_fields__)
    return all(
        isinstance(shape, dict)
        and set(shape) == fields
        and all(
            isinstance(part, dict) and all(isinstance(ms, int | float) for ms in part.values())
            for part in shape.values()
        )
        for shape in value["shapes"].values()
    )


class LatencyModel:
    """`budget.Speeds` from timings of a few shapes; `time_shape` times one shape, and `timings` keeps the results."""

    def __init__(self, time_shape: Callable[[Dims], Timing], timings: TimingFile):
        self._time_shape, self._timings = time_shape, timings
        self._timed_here: dict[Dims, Timing] = {}
        self._weights: dict[str, Floats] = {}
        self.error: dict[str, float] = {}

    def timing(self, dims: Dims) -> Timing:
        """The timing of this shape, now or from the file; from now on it counts instead of the prediction."""
        timing = self._timings.get(dims)
        if timing is None:
            timing = self._time_shape(dims)
            self._timings.add(dims, timing)
        self._timed_here[dims] = timing
        return timing

    def fit(self, teacher: Dims, shapes: Shapes, advance: Callable[[float, str], None] = lambda *_: None) -> None:
        """Time the teacher's shape and a few of `shapes` that differ most, and fit the model to them.

        Calls `advance(1, shape)` after each one. `error` is then the median relative error of the prediction, by kind.
        """
        features_RP = _features(shapes)
        teacher_P = _features({axis: np.array([getattr(teacher, axis)]) for axis in shapes})
        scale_P = teacher_P[0]
        chosen = _spread_out(features_RP / scale_P, teacher_P[0] / scale_P, _DESIGN_SHAPES - 1)
        designs = [teacher]
        designs += [teacher.resized(**{axis: int(values[i]) for axis, values in shapes.items()}) for i in chosen]
        timings = []
        for dims in designs:
            timings.append(self.timing(dims))
            advance(1, f"hidden {dims.hidden}, ffn {dims.ffn}, heads {dims.heads}")
        design_RP = np.concatenate([teacher_P, features_RP[chosen]])
        for kind in LATENCY_KINDS:
            layer_R = np.array([timing.layer[kind] for timing in timings])
            rest_R = np.array([timing.rest[kind] for timing in timings])
            hidden_R2 = design_RP[:, [0, -1]]
            self._weights[f"{kind}.layer"] = _nonnegative_fit(design_RP / scale_P, layer_R) / scale_P
            self._weights[f"{kind}.rest"] = _nonnegative_fit(hidden_R2 / scale_P[[0, -1]], rest_R) / scale_P[[0, -1]]
            self.error[kind] = _left_out_error(design_RP / scale_P, layer_R)

    def milliseconds(self, kind: LatencyKind, shapes: Shapes) -> Floats:
        """Predicted by the fitted model; for layer shapes that were timed, the timing itself."""
        features_RP = _features(shapes)
        layer_R = features_RP @ self._weights[f"{kind}.layer"]
        rest_R: Floats = features_RP[:, [0, -1]] @ self._weights[f"{kind}.rest"]
        total_R = rest_R + layer_R * shapes["layers"]
        for dims, timing in self._timed_here.items():
            same_R = np.all([shapes[axis] == getattr(dims, axis) for axis in _LAYER_AXES], axis=0)
            total_R[same_R] = timing.rest[kind] + timing.layer[kind] * shapes["layers"][same_R]
        return total_R


def _layer_key(dims: Dims) -> str:
    key = f"hidden={dims.hidden} ffn={dims.ffn} heads={dims.heads} kv_heads={dims.kv_heads}"
    more = {axis: getattr(dims, axis) for axis in ("experts", "ssm_heads", "ssm_head_dim", "ssm_state")}
    return key + "".join(f" {axis}={size}" for axis, size in more.items() if size)


def _features(shapes: Shapes) -> Floats:
    """[R, P]: what a layer's time may be proportional to; the first feature is 1 and the last the hidden size."""
    hidden, ffn, heads, kv_heads = (shapes[a].astype(np.float64) for a in ("hidden", "ffn", "heads", "kv_heads"))
    mixed = shapes["ssm_heads"].astype(np.float64) * shapes["ssm_head_dim"]
    state = shapes["ssm_state"].astype(np.float64)
    # a column of zeros would tell nothing
    of_mixers = [hidden * mixed, hidden * state, mixed * state] if mixed.any() else []
    columns = [np.ones_like(hidden), hidden * ffn, hidden * heads, hidden * kv_heads, heads, *of_mixers, hidden]
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
        solution, *_ = np.linalg.lstsq(rows_RP[:, active] * scale_R[:, None], values_R * scale_R, rcond=1e-9)
        if solution.min() >= 0:
            weights_P[active] = solution
            break
        active.pop(int(solution.argmin()))
    return weights_P


def _left_out_error(rows_RP: Floats, values_R: Floats) -> float:
    """Median relative error of predicting each shape from the others."""
    errors = []
    for out in range(len(values_R)):
        kept = np.arange(len(values_R)) != out
        predicted = float(rows_RP[out] @ _nonnegative_fit(rows_RP[kept], values_R[kept]))
        errors.append(abs(predicted / max(float(values_R[out]), 1e-9) - 1))
    return float(statistics.median(errors))
