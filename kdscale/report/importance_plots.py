"""The plots of importance, one for each axis.

L layers · U units · C columns of a heat map
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdscale.config.criteria import AXIS_TITLES
from kdscale.report.svg import ACCENT, AFTER, GRID, Plot, integers, make_plot, style

# Middle tones that are readable on white and on near-black; heat maps are images and cannot follow a variable.
_HEAT_RGB = (0.16, 0.50, 0.73)
_HEAT_COLUMNS = 96
_CHANGE = "How much each layer changes the stream that runs through it"
_WHAT_LAYERS_SCORE = {
    "one_by_one": "How far from the whole model it is once the layer goes, after all that cost less (nats of KL)",
    "loss": "Rise of the loss without each layer",
    "angular": "How far each layer alone turns the stream that runs through it",
}


def importance(facts: Mapping[str, Any]) -> list[Plot]:
    """One plot for each axis that has scores: layers, ffn, heads, kv heads, experts, hidden."""
    made = facts["importance"]
    if not made:
        return []
    methods = (facts["plan"] or {}).get("methods", {})
    drawers = {
        "layers": _layers,
        "ffn": _ffn,
        "heads": _heads,
        "kv_heads": _heads,
        "experts": _heads,
        "ssm_heads": _heads,
        "ssm_head_dim": _heads,
        "ssm_state": _heads,
        "hidden": _hidden,
    }
    out = []
    for axis, drawer in drawers.items():
        names = [name for name in made["scores"] if name.partition(".")[0] == axis]
        used = [name for name in names if name.partition(".")[2] == methods.get(axis)]
        for name in (used or names)[:1]:
            values = np.asarray(made["scores"][name], dtype=np.float64)
            if np.isfinite(values).all() and values.size:
                out.append(drawer(axis, name, values, facts))
    return out


def _layers(_: str, name: str, score_L: np.ndarray, facts: Mapping[str, Any]) -> Plot:
    if score_L.ndim == 2:  # of blocks: those of one layer are drawn
        score_L = score_L.diagonal(1)
    kept = set(facts["kept"]["layers"]) if facts["kept"] else set(range(len(score_L)))

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        colours = [AFTER if layer in kept else GRID for layer in range(len(score_L))]
        axes.bar(range(len(score_L)), score_L, color=colours, width=0.72)
        axes.set_xlabel("layer")
        axes.set_yscale("log" if score_L.min() > 0 and score_L.max() > 30 * score_L.min() else "linear")
        style(axes)
        axes.set_xlim(-0.7, len(score_L) - 0.3)
        axes.xaxis.set_major_locator(integers(6 if narrow else 12))

    dropped = sorted(set(range(len(score_L))) - kept)
    weakest = int(score_L.argmin())
    gone = f" Dropped: {', '.join(map(str, dropped))}." if dropped else " All layers stay."
    return make_plot(
        f"Layers · {_method(name)}",
        f"{_WHAT_LAYERS_SCORE.get(name.partition('.')[2], _CHANGE)}.{gone}",
        f"Bar chart over {len(score_L)} layers; the least important is layer {weakest}.{gone}",
        draw,
        (880, 230),
        (350, 210),
    )


def _ffn(axis: str, name: str, score_LU: np.ndarray, facts: Mapping[str, Any]) -> Plot:
    """Units of a layer are sorted by score, so a column is a rank; the vertical line is where the layer was cut."""
    layers, units = score_LU.shape
    ranked_LU = -np.sort(-score_LU, axis=1)
    # Relative to the layer's median, in decades: one huge unit, which some layers have, would move a mean.
    relative_LU = ranked_LU / np.maximum(np.median(ranked_LU, axis=1, keepdims=True), np.finfo(float).tiny)
    columns = min(units, _HEAT_COLUMNS)
    edges = np.linspace(0, units, columns + 1).round().astype(int)
    binned_LC = np.stack([relative_LU[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)], axis=1)
    decades_LC = np.clip(np.log10(np.maximum(binned_LC, 1e-9)), -1, 1)
    counts = {row["layer"]: row.get(axis) for row in facts["kept"]["per_layer"]} if facts["kept"] else {}

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        _heat(axes, (decades_LC + 1) / 2, (0, units, layers - 0.5, -0.5))
        for layer, kept in counts.items():
            if kept is not None and kept < units:
                axes.plot([kept, kept], [layer - 0.5, layer + 0.5], color=ACCENT, linewidth=1.8, solid_capstyle="butt")
        axes.set_xlabel("units, most important first")
        axes.set_ylabel("layer")
        style(axes, grid=False)
        axes.yaxis.set_major_locator(integers(8))
        axes.xaxis.set_major_locator(integers(4 if narrow else 8))

    shares = {
        layer: ranked_LU[layer, :kept].sum() / max(ranked_LU[layer].sum(), 1e-300)
        for layer, kept in counts.items()
        if kept is not None
    }
    sentence = ""
    if shares:
        low = min(shares, key=lambda layer: shares[layer])
        sentence = (
            f" The units left of the line stay; they hold {min(shares.values()):.0%} to {max(shares.values()):.0%} of "
            f"a layer’s importance, the least in layer {low}."
        )
    return make_plot(
        f"Feed-forward units · {_method(name)}",
        f"Stronger colour: more important than the layer’s median unit (log scale, a tenth to ten times).{sentence}",
        f"Heat map of {layers} layers by {units} feed-forward units sorted by importance.{sentence}",
        draw,
        (880, 90 + 9 * layers),
        (350, 90 + 9 * layers),
    )


def _heads(axis: str, name: str, score_LU: np.ndarray, facts: Mapping[str, Any]) -> Plot:
    """One cell a head (or expert), where it is in the model; a cross in the cells of those that went."""
    layers, units = score_LU.shape
    unit = {"experts": "expert", "ssm_head_dim": "channel", "ssm_state": "channel"}.get(axis, "head")
    share_LU = score_LU / np.maximum(score_LU.max(axis=1, keepdims=True), np.finfo(float).tiny)
    stays = np.full((layers, units), facts["kept"] is None)
    if kept := facts["kept"]:
        for layer, heads in zip(kept["layers"], kept[axis], strict=True):
            stays[layer, heads] = True
    gone = int((~stays).sum())

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        _heat(axes, share_LU.T, (-0.5, layers - 0.5, units - 0.5, -0.5))
        rows, columns = np.nonzero(~stays)
        axes.plot(
            rows, columns, linestyle="", marker="x", color=ACCENT, markersize=4 if narrow else 6, markeredgewidth=1.5
        )
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        style(axes, grid=False)
        axes.xaxis.set_major_locator(integers(6 if narrow else 12))
        axes.yaxis.set_major_locator(integers(6))

    cut = f" Crosses mark the {gone} of {layers * units} that were cut." if gone else " None was cut."
    return make_plot(
        f"{AXIS_TITLES[axis]} · {_method(name)}",
        f"Stronger colour: more important, relative to the layer’s strongest {unit}.{cut}",
        f"Heat map of {units} {unit}s by {layers} layers.{cut}",
        draw,
        (880, 90 + 19 * units),
        (350, 90 + 16 * units),
    )


def _hidden(_: str, name: str, score_U: np.ndarray, facts: Mapping[str, Any]) -> Plot:
    ranked = -np.sort(-score_U)
    kept = facts["kept"]["hidden"] if facts["kept"] else len(ranked)

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        x = np.arange(len(ranked))
        axes.plot(x, ranked, color=AFTER, linewidth=1.6)
        axes.fill_between(x[:kept], ranked[:kept], color=AFTER, alpha=0.25, linewidth=0)
        if kept < len(ranked):
            axes.axvline(kept, color=ACCENT, linewidth=1.8)
        if ranked[-1] > 0:
            axes.set_yscale("log")
        axes.set_xlabel("channels, most important first")
        style(axes)
        axes.xaxis.set_major_locator(integers(4 if narrow else 8))

    sentence = f"{kept} of {len(ranked)} channels stay, the same in every layer."
    return make_plot(
        f"Hidden channels · {_method(name)}",
        sentence,
        f"Curve of sorted scores. {sentence}",
        draw,
        (880, 230),
        (350, 210),
    )


def _heat(axes: Any, strength: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """One hue whose opacity is the value (0…1): it lies well on a light and on a dark page."""
    rgba = np.empty((*strength.shape, 4))
    rgba[..., :3] = _HEAT_RGB
    rgba[..., 3] = 0.06 + 0.94 * np.clip(strength, 0, 1)
    axes.imshow(rgba, aspect="auto", interpolation="nearest", extent=extent)


def _method(name: str) -> str:
    return name.partition(".")[2].replace("_", " ")
