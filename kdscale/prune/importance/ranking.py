"""From scores to kept units, and how much of the importance a shape keeps. numpy only.

Every score is turned into a non-negative share of something that adds up (energy): output energies as they are,
activation scores squared (they are L2 norms), block influences as they are. So "retained" means one thing on every
axis: the part of the sum that the kept units hold.

L layers · E experts · F ffn units (of an expert) · Q query heads · K kv heads · G = Q/K query heads a group · D hidden
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdscale.config.prune import PruneConfig
from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import Dims

SCORES_FILE, SUMMARY_FILE = "scores.safetensors", "scores.json"


Floats = NDArray[np.float64]


# Scores of importance.py that are L2 norms rather than energies.
_AMPLITUDES = ("ffn.activation", "heads.activation", "hidden.activation", "experts.output_norm")


def score_name(axis: str, cfg: PruneConfig) -> str:
    """The array in scores.safetensors that ranks `axis` under this config."""
    return {
        "ffn": f"ffn.{cfg.ffn_method}",
        "heads": f"heads.{cfg.head_method}",
        "kv_heads": "kv_heads.output_energy",
        # auto has been resolved by rotate.choose; alone it means channels as they are
        "hidden": "hidden.pca" if cfg.hidden_method == "pca" else "hidden.activation",
        "experts": "experts.output_norm",
        "layers": f"layers.{cfg.layer_method}",
    }[axis]


def depth_methods(cfg: PruneConfig) -> list[str]:
    """Scores of layers that cost a pass of their own; they are gathered only when the config ranks by them."""
    return [cfg.layer_method] if cfg.layer_method in ("loss", "angular") else []


def obs_axes(cfg: PruneConfig) -> list[str]:
    """Axes whose removal costs the config ranks by; they are gathered only then."""
    return [axis for axis, method in (("ffn", cfg.ffn_method), ("heads", cfg.head_method)) if method == "obs"]


class Ranking:
    """Kept units and retained shares of one teacher. Without scores: the first units, and no shares."""

    def __init__(self, dims: Dims, scores: Mapping[str, Any] | None, cfg: PruneConfig, needed: tuple[str, ...]):
        """`needed`: axes that may be cut. Raises ConfigError when a score they need is missing or malformed."""
        self.dims, self.cfg, self.has_scores = dims, cfg, scores is not None
        self._energy: dict[str, Floats] = {}
        shapes = {
            "ffn": (dims.layers, dims.experts, dims.ffn) if dims.experts else (dims.layers, dims.ffn),
            "experts": (dims.layers, dims.experts),
            "heads": (dims.layers, dims.heads),
            "kv_heads": (dims.layers, dims.kv_heads),
            "hidden": (dims.hidden,),
            "layers": (dims.layers, dims.layers + 1) if cfg.layer_method == "angular" else (dims.layers,),
        }
        # Cutting kv heads also chooses among the query heads that stay beside them.
        wanted = {*needed, "heads"} if "kv_heads" in needed else set(needed)
        for axis in sorted(wanted) if scores is not None else []:
            name = score_name(axis, cfg)
            if name != "layers.last":
                self._energy[axis] = _energy(name, scores or {}, shapes[axis])

    def method(self, axis: str) -> str:
        if axis == "layers" and (self.cfg.layer_method == "last" or not self.has_scores):
            return "last"
        if not self.has_scores:
            return "first"
        block = axis == "layers" and self.cfg.contiguous_layers and self.cfg.layer_method != "angular"
        return ("contiguous_" if block else "") + _method(axis, self.cfg)

    def layers(self, count: int) -> list[int]:
        """Kept layers. Without scores, or with layer_method `last`: all but the last ones before the final layer, the
        region that arXiv 2408.11796 (section 3.2) drops as one block."""
        total, drop = self.dims.layers, self.dims.layers - count
        scores = self._energy.get("layers")
        if scores is None:
            start = max(total - 1 - drop, 0)
        elif self.cfg.layer_method == "angular":
            start = int(np.argmin([scores[layer, layer + drop] for layer in range(count + 1)]))
        elif self.cfg.contiguous_layers:
            sums = np.concatenate([[0.0], np.cumsum(scores)])
            start = int(np.argmin(sums[drop:] - sums[: total - drop + 1]))
        else:
            return _top(scores, count)
        return [layer for layer in range(total) if not start <= layer < start + drop]

    def hidden(self, count: int) -> list[int]:
        energy = self._energy.get("hidden")
        return list(range(count)) if energy is None else _top(energy, count)

    def ffn(self, layer: int, count: int, expert: int | None = None) -> list[int]:
        """Kept ffn units; of a mixture of experts those of `expert`."""
        energy = self._energy.get("ffn")
        if energy is None:
            return list(range(count))
        return _top(energy[layer] if expert is None else energy[layer, expert], count)

    def experts(self, layer: int, count: int) -> list[int]:
        energy = self._energy.get("experts")
        return list(range(count)) if energy is None else _top(energy[layer], count)

    def kv_heads(self, layer: int, count: int) -> list[int]:
        energy = self._energy.get("kv_heads")
        return list(range(count)) if energy is None else _top(energy[layer], count)

    def heads(self, layer: int, groups: list[int], per_group: int) -> list[int]:
        """`per_group` query heads of each kv group in `groups`, ranked inside the group."""
        size, energy = self.dims.heads // self.dims.kv_heads, self._energy.get("heads")
        out: list[int] = []
        for group in groups:
            inside = np.zeros(size) if energy is None else energy[layer, group * size : (group + 1) * size]
            out += [group * size + head for head in _top(inside, per_group)]
        return out

    def retained(self, axis: str, *, layers: list[int], count: int, kv_heads: int | None = None) -> float | None:
        """Share of `axis`' importance that `count` units keep, mean over the kept `layers`; None without a score.

        For `heads`, `kv_heads` says how many groups the `count` heads are spread over.
        """
        if axis not in self._energy:
            return None
        energy = self._energy[axis]
        if axis == "layers":
            if self.cfg.layer_method == "angular":  # by the angle that each layer turns on its own
                energy = energy.diagonal(1)
            # The first layer turns the embedding around (0.99 on SmolLM2, where most layers have 0.04): in a plain sum
            # it would make dropping any other look free (docs/explanation/measured-pruning.md).
            return _share(np.minimum(energy, np.median(energy)), layers)
        if axis == "hidden":
            return _share(energy, _top(energy, count))
        if axis == "heads":
            groups = kv_heads or self.dims.kv_heads
            kept = [self.heads(layer, self.kv_heads(layer, groups), count // groups) for layer in layers]
        elif axis == "ffn" and self.dims.experts:
            rows = energy[layers].reshape(-1, self.dims.ffn)
            return float(np.mean([_share(row, _top(row, count)) for row in rows]))
        else:
            kept = [_top(energy[layer], count) for layer in layers]
        return float(np.mean([_share(energy[layer], units) for layer, units in zip(layers, kept, strict=True)]))


def _method(axis: str, cfg: PruneConfig) -> str:
    return score_name(axis, cfg).partition(".")[2]


def _energy(name: str, scores: Mapping[str, Any], shape: tuple[int, ...]) -> Floats:
    if name not in scores:
        raise ConfigError(
            f"the importance scores lack {name!r}",
            expected="scores for every axis that may be cut",
            got=", ".join(sorted(scores)) or "none",
            hint="run the importance stage again with this config",
        )
    values = np.asarray(scores[name], dtype=np.float64)
    if values.shape != shape or not np.isfinite(values).all() or (values < 0).any():
        raise ConfigError(
            f"the importance scores {name!r} cannot be used",
            expected=f"finite, non-negative values of shape {shape}",
            got=f"shape {values.shape}, min {values.min() if values.size else None}",
            hint="run the importance stage again with this teacher",
        )
    return values**2 if name in _AMPLITUDES else values


def _top(energy: Floats, count: int) -> list[int]:
    """The `count` largest, rising; among equals the lower index, so that a plan never depends on the sort."""
    return sorted(int(index) for index in np.argsort(-energy, kind="stable")[:count])


def _share(energy: Floats, kept: list[int]) -> float:
    total = float(energy.sum())
    return float(energy[kept].sum()) / total if total > 0 else len(kept) / len(energy)


def load_scores(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The arrays of `importance.run` in `folder`. Raises CheckpointError when they are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / SCORES_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", expected="importance scores", hint="run kdscale importance first")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged", got=str(error), hint="run kdscale importance again") from error
