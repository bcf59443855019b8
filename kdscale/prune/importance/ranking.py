"""From scores to kept units, and the share of the importance that a shape keeps. numpy only.

Ranking works on energies (`ImportanceScores.energy`): numbers that add up. So "retained" means one thing on every axis:
the part of the sum that the kept units hold.

L layers · E experts · F ffn units (of an expert) · Q query heads · K kv heads · G = Q/K query heads per group
D hidden · M ssm heads
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdscale.config import criteria
from kdscale.config.criteria import FOLLOWED, Criterion
from kdscale.config.prune import PlannedRepair, PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims
from kdscale.families.cuttable import Lacks, with_sources
from kdscale.runs.importance_scores import ImportanceScores

Floats = NDArray[np.float64]

# Of the rise of log-perplexity that dropped layers cost, what is left when their gaps are repaired: 0.46 of it for
# Gemma 3 270M without 5 layers and 0.60 for SmolLM2-135M without 10 (measured-pruning.md in the docs), two cuts alone.
_LEFT_BY_REPAIR = 0.6


def criteria_to_measure(cfg: PruneConfig, axes: Sequence[str]) -> list[Criterion]:
    """The criteria of the axes that may be cut: the cheap ones, and of the expensive ones those that `cfg` ranks by."""
    scored = {*axes, *_ranked_together(axes)}
    return [
        row
        for row in criteria.CRITERIA
        if row.axis in scored and (not row.on_request or row == cfg.criterion(row.axis))
    ]


def layer_repair(cfg: PruneConfig, dims: Dims) -> PlannedRepair:
    """What is done about dropped layers: no single projection of a mixture of experts can give what they gave,
    and a mixer's factors (Falcon-H1's) or layers without an MLP (Nemotron-H's) are in the way of one in a hybrid."""
    if cfg.layer_repair != "auto":
        return cfg.layer_repair
    return "linear" if not dims.experts and not dims.ssm_heads and cfg.compensate != "none" else "none"


def most_dropped(cfg: PruneConfig, dims: Dims) -> int:
    """How many layers `cfg` may drop, for criteria that tell their order: half of them where the search decides."""
    return max(1, dims.layers - cfg.layers if cfg.layers else dims.layers // 2)


def _ranked_together(axes: Sequence[str]) -> set[str]:
    """Cutting kv heads also chooses among the query heads that read the kept ones, and the other way round."""
    return {"heads", "kv_heads"} if {"heads", "kv_heads"} & set(axes) else set()


class Ranking:
    """Kept units and retained shares of one teacher. Without scores: the first units, and no shares."""

    def __init__(
        self,
        dims: Dims,
        scores: Mapping[str, Any] | None,
        cfg: PruneConfig,
        needed: tuple[str, ...],
        layer_axes: Sequence[frozenset[str]] | None = None,
        expert_groups: int = 1,
        keeps_first: bool = False,
        may_end: Sequence[bool] | None = None,
        lacks: Lacks | None = None,
    ):
        """`needed`: axes that may be cut. `layer_axes`: those that each layer has, by default all of them.
        `expert_groups`: of which each keeps as many experts as any other. `keeps_first`: no student lacks layer 0.
        `may_end`: of each layer, whether a student may end with it; by default with any.
        `lacks`: see `sources_lacking`.

        Raises ConfigError when a score they need is missing or malformed.
        """
        self.dims, self.cfg, self.has_scores, self._layer_axes = dims, cfg, scores is not None, layer_axes
        self._expert_groups, self._keeps_first, self._may_end = expert_groups, keeps_first, may_end
        self._lacks = lacks
        self._energy: dict[str, Floats] = {}
        blocks = cfg.criterion("layers").scores_blocks
        shapes = {
            "ffn": (dims.layers, dims.experts, dims.ffn) if dims.experts else (dims.layers, dims.ffn),
            "experts": (dims.layers, dims.experts),
            "heads": (dims.layers, dims.heads),
            "kv_heads": (dims.layers, dims.kv_heads),
            "ssm_heads": (dims.layers, dims.ssm_heads),
            "ssm_head_dim": (dims.layers, dims.ssm_head_dim),
            "ssm_state": (dims.layers, dims.ssm_state),
            "hidden": (dims.hidden,),
            "layers": (dims.layers, dims.layers + 1) if blocks else (dims.layers,),
        }
        if scores is None:
            return
        measured = scores if isinstance(scores, ImportanceScores) else ImportanceScores(scores)
        for axis in sorted({*needed, "heads"} if "kv_heads" in needed else needed):
            row = cfg.criterion(axis)
            if row.collect is not None:
                self._energy[axis] = _checked_energy(row.name, measured, shapes[axis])
                for follower in (name for name, leader in FOLLOWED.items() if leader == axis):
                    if any(self.has(layer, follower) for layer in range(dims.layers)):
                        shape = (dims.layers, getattr(dims, follower))
                        self._energy[follower] = _checked_energy(row.name_of(follower), measured, shape)

    def has(self, layer: int, axis: str) -> bool:
        """Whether a layer of the teacher has units of `axis`."""
        if self._layer_axes is None:
            return bool(getattr(self.dims, axis))
        return axis in self._layer_axes[layer]

    def method(self, axis: str) -> str:
        """What ranked `axis`, as the plan records it; `first` and `last` where there are no scores."""
        row = self.cfg.criterion(axis)
        if axis == "layers" and row.collect is None:
            return row.method
        if axis == "layers" and not self.has_scores:
            return "last"
        if not self.has_scores:
            return "first"
        block = axis == "layers" and self.cfg.contiguous_layers and not row.scores_blocks
        return f"contiguous_{row.method}" if block else row.method

    def damage(self, axis: str, usual: float) -> float:
        """How much a lost share of `axis` raises the log-perplexity: the criterion's own weight or the `usual` one."""
        row = self.cfg.criterion(axis)
        if row.damage is None:
            return usual
        repaired = row.in_order and layer_repair(self.cfg, self.dims) != "none"
        return row.damage * _LEFT_BY_REPAIR if repaired else row.damage

    def layers(self, count: int) -> list[int]:
        """Kept layers, at least one with attention: transformers' cache counts its tokens in such a layer. The last
        one is one that the family lets a model end with.

        Raises ConfigError where that would break a contiguous block.
        """
        every = range(self.dims.layers)
        if count == len(every):
            return list(every)
        kept = self._best_layers(count)
        attending = [layer for layer in every if self.has(layer, "kv_heads")]
        if attending and not set(kept) & set(attending):
            kept = self._with_one_of(attending, kept, "one with attention")
        if self._may_end is not None and not self._may_end[kept[-1]]:
            last = [layer for layer in every if self._may_end[layer]][-1:]
            kept = self._with_one_of(last, kept, f"layer {last[0]}, with which the model ends")
        if self._lacks is not None and self._lacks(kept):
            self._refuse_block(kept, "layers whose keys and values others read")
            ends = self._may_end or [True] * self.dims.layers
            kept = with_sources(kept, self._lacks, ends.__getitem__, self._layer_score)
        return kept

    def _with_one_of(self, wanted: Sequence[int], kept: list[int], what: str) -> list[int]:
        """`kept` with the best of the `wanted` layers in the place of the weakest."""
        self._refuse_block(kept, what)
        weakest, best = min(kept, key=self._layer_score), max(wanted, key=self._layer_score)
        return sorted({*kept, best} - {weakest})

    def _refuse_block(self, kept: list[int], what: str) -> None:
        if self.cfg.contiguous_layers or self.cfg.criterion("layers").scores_blocks:
            raise ConfigError(
                "prune.layers", expected=f"a block of layers that leaves {what}",
                got=f"only layers {', '.join(map(str, kept))} stay", hint="keep more layers, or not contiguous ones",
            )  # fmt: skip

    def _layer_score(self, layer: int) -> float:
        scores = self._energy.get("layers")
        return float(layer if scores is None else scores[layer])

    def _best_layers(self, count: int) -> list[int]:
        """The layers with the highest scores.

        Without scores: all but the last ones before the final layer, as arXiv 2408.11796 (section 3.2) drops them.
        """
        total, drop = self.dims.layers, self.dims.layers - count
        scores, first = self._energy.get("layers"), int(self._keeps_first)  # `first` that may go
        if self.cfg.criterion("layers").method == "spread":
            return [0] if self._keeps_first and count == 1 else spread_layers(total, count)
        if scores is None:
            start = max(total - 1 - drop, first)
        elif self.cfg.criterion("layers").scores_blocks:
            start = first + int(np.argmin([scores[layer, layer + drop] for layer in range(first, count + 1)]))
        elif self.cfg.contiguous_layers:
            sums = np.concatenate([[0.0], np.cumsum(scores)])
            start = first + int(np.argmin((sums[drop:] - sums[: total - drop + 1])[first:]))
        elif self._keeps_first:
            return [0, *(1 + layer for layer in _top(scores[1:], count - 1))]
        else:
            return _top(scores, count)
        return [layer for layer in range(total) if not start <= layer < start + drop]

    def hidden(self, count: int) -> list[int]:
        """Kept channels."""
        energy = self._energy.get("hidden")
        return list(range(count)) if energy is None else _top(energy, count)

    def ffn(self, layer: int, count: int, expert: int | None = None) -> list[int]:
        """Kept ffn units; of a mixture of experts those of `expert`."""
        energy = self._energy.get("ffn")
        if energy is None:
            return list(range(count))
        return _top(energy[layer] if expert is None else energy[layer, expert], count)

    def units(self, axis: str, layer: int, count: int) -> list[int]:
        """Kept units of an axis that has no rules of its own: of one that follows ffn, and of what all heads, or all
        groups, of a mixer have alike."""
        energy = self._energy.get(axis)
        return list(range(count)) if energy is None else _top(energy[layer], count)

    def experts(self, layer: int, count: int) -> list[int]:
        """Kept experts."""
        groups, of_group = self._expert_groups, self.dims.experts // self._expert_groups
        energy = self._energy.get("experts")
        energy_E = np.zeros(self.dims.experts) if energy is None else energy[layer]
        starts = range(0, groups * of_group, of_group)
        return [start + e for start in starts for e in _top(energy_E[start : start + of_group], count // groups)]

    def kv_heads(self, layer: int, count: int) -> list[int]:
        """Kept kv heads."""
        energy = self._energy.get("kv_heads")
        return list(range(count)) if energy is None else _top(energy[layer], count)

    def heads(self, layer: int, groups: list[int], per_group: int) -> list[int]:
        """`per_group` query heads of each kv group in `groups`, ranked inside the group."""
        energy = self._energy.get("heads")
        all_Q = np.zeros(self.dims.heads) if energy is None else energy[layer]
        return _top_in_groups(all_Q, groups, per_group, self.dims.kv_heads)

    def ssm_heads(self, layer: int, count: int) -> list[int]:
        """Kept ssm heads, as many of each group, ranked inside the group."""
        groups, energy = self.dims.ssm_groups, self._energy.get("ssm_heads")
        all_M = np.zeros(self.dims.ssm_heads) if energy is None else energy[layer]
        return _top_in_groups(all_M, range(groups), count // groups, groups)

    def retained(self, axis: str, *, layers: list[int], count: int, kv_heads: int | None = None) -> float | None:
        """Share of `axis`' importance that `count` units keep, mean over the kept `layers`; None without a score.

        For `heads`, `kv_heads` says how many groups the `count` heads are spread over.
        """
        if axis not in self._energy:
            return None
        energy = self._energy[axis]
        if axis == "layers":
            row = self.cfg.criterion("layers")
            if row.in_order and row.damage:
                gone = sorted(set(range(self.dims.layers)) - set(layers))
                return 1 - min(float(energy[gone].max()) / row.damage, 1.0) if gone else 1.0
            if row.scores_blocks:
                energy = energy.diagonal(1)  # the blocks of one layer
            # The first layer turns the embedding around (0.99 on SmolLM2, where most layers have 0.04): in a plain sum
            # it would make dropping any other look free (docs/explanation/measured-pruning.md).
            return _share(np.minimum(energy, np.median(energy)), layers)
        if axis == "hidden":
            return _share(energy, _top(energy, count))
        if axis == "ffn":
            return self._retained_ffn(layers, count)
        layers = [layer for layer in layers if self.has(layer, axis)]
        if axis == "heads":
            groups = kv_heads or self.dims.kv_heads
            kept = [self.heads(layer, self.kv_heads(layer, groups), count // groups) for layer in layers]
        elif axis == "ssm_heads":
            kept = [self.ssm_heads(layer, count) for layer in layers]
        elif axis == "experts":
            kept = [self.experts(layer, count) for layer in layers]
        else:
            kept = [_top(energy[layer], count) for layer in layers]
        shares = [_share(energy[layer], units) for layer, units in zip(layers, kept, strict=True)]
        return float(np.mean(shares)) if shares else 1.0

    def _retained_ffn(self, layers: list[int], count: int) -> float:
        """The mean over all MLPs of the layers: the experts, and what follows them."""
        student = self.dims.resized(ffn=count)
        shares: list[float] = []
        for axis in ("ffn", *(name for name, leader in FOLLOWED.items() if leader == "ffn" and name in self._energy)):
            size, width = getattr(student, axis), getattr(self.dims, axis)
            for layer in (layer for layer in layers if self.has(layer, axis)):
                rows = self._energy[axis][layer].reshape(-1, width)
                shares += [_share(row, _top(row, size)) for row in rows]
        return float(np.mean(shares)) if shares else 1.0


def spread_layers(total: int, count: int) -> list[int]:
    """`count` of `total` layers, evenly spaced from the first to the last; one alone is the last."""
    if count == 1:
        return [total - 1]
    return [round(place * (total - 1) / (count - 1)) for place in range(count)]


def _checked_energy(name: str, scores: ImportanceScores, shape: tuple[int, ...]) -> Floats:
    if name not in scores.units:
        raise ConfigError(
            f"the importance scores lack {name!r}",
            expected="scores for every axis that may be cut",
            got=", ".join(sorted(scores.units)) or "none",
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
    return scores.energy(name)


def _top(energy: Floats, count: int) -> list[int]:
    """The `count` largest, rising; among equals the lower index, so that a plan never depends on the sort."""
    return sorted(int(index) for index in np.argsort(-energy, kind="stable")[:count])


def _top_in_groups(energy: Floats, groups: Iterable[int], per_group: int, of: int) -> list[int]:
    """The `per_group` largest of each of the `groups` that are kept; there are `of` equal groups in all."""
    size = len(energy) // of
    return [
        group * size + unit for group in groups for unit in _top(energy[group * size : (group + 1) * size], per_group)
    ]


def _share(energy: Floats, kept: list[int]) -> float:
    total = float(energy.sum())
    return float(energy[kept].sum()) / total if total > 0 else len(kept) / len(energy)
