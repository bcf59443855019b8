"""The plots of a distillation: the loss curve, and the terms that its objectives log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdscale.report.svg import ACCENT, AFTER, INK, Plot, count_formatter, integers, make_plot, style

_PANELS_A_ROW = 3  # of the terms, on a wide page


def curves(facts: Mapping[str, Any]) -> Plot | None:
    """Training loss (each step and smoothed) and validation perplexity over tokens; None without points."""
    log = facts["curves"]
    if not log or not (log["train"] or log["validation"]):
        return None
    train = [p for p in log["train"] if "loss" in p]
    validation = [p for p in log["validation"] if "perplexity" in p or "loss" in p]
    key = "tokens" if all("tokens" in p for p in train + validation) else "step"
    measure = "perplexity" if all("perplexity" in p for p in validation) else "loss"
    clauses: list[str] = []
    if train:
        clauses.append(f"training loss from {train[0]['loss']:.3f} to {_smooth([p['loss'] for p in train])[-1]:.3f}")
    if validation:
        clauses.append(f"validation {measure} from {validation[0][measure]:.3g} to {validation[-1][measure]:.3g}")
    panels = [(panel, points) for panel, points in ((_draw_train, train), (_draw_validation, validation)) if points]

    def draw(figure: Any, narrow: bool) -> None:
        grid = (len(panels), 1) if narrow else (1, len(panels))
        for number, (panel, points) in enumerate(panels, 1):
            axes = figure.add_subplot(*grid, number)
            panel(axes, points, key, measure)
            style(axes)
            axes.set_xlabel("training tokens" if key == "tokens" else "step")
            if key == "tokens":
                axes.xaxis.set_major_formatter(count_formatter())

    scale = ", on a log axis" if measure == "perplexity" else ""
    caption = f"Training: every step (faint) and the mean around it. Validation: held-out {measure}{scale}."
    return make_plot(
        "Loss curve",
        caption if len(panels) == 2 else "",
        f"Line chart over {'tokens' if key == 'tokens' else 'steps'}: {'; '.join(clauses)}.",
        draw,
        (880, 290),
        (350, 250 * len(panels)),
    )


def terms(facts: Mapping[str, Any]) -> Plot | None:
    """One panel for each term that the objectives log beside the loss; None without any."""
    logged = [term for term in (facts["curves"] or {}).get("terms", []) if term["train"]]
    if not logged:
        return None

    def draw(figure: Any, narrow: bool) -> None:
        columns = 1 if narrow else _PANELS_A_ROW
        for number, term in enumerate(logged, 1):
            axes = figure.add_subplot(-(-len(logged) // columns), columns, number)
            scale = 100 if term["unit"] == "fraction" else 1
            steps, values = zip(*term["train"], strict=True)
            axes.plot(steps, [scale * value for value in _smooth(values)], color=AFTER, linewidth=1.7)
            if term["validation"]:
                steps, values = zip(*term["validation"], strict=True)
                axes.plot(
                    steps, [scale * value for value in values], color=ACCENT, linewidth=1, marker="o", markersize=3
                )
            unit = {"fraction": "%"}.get(term["unit"], term["unit"])
            axes.set_title(f"{term['title']}, {unit}" if unit else term["title"], loc="left", fontsize=9.5, wrap=True)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(integers(4))
            style(axes)

    rows = -(-len(logged) // _PANELS_A_ROW)
    return make_plot(
        "What the objectives report",
        "Training, smoothed (green), and validation (orange), by step.",
        f"Line charts by step: {', '.join(term['title'] for term in logged)}.",
        draw,
        (880, 180 * rows + 20),
        (350, 190 * len(logged)),
    )


def _draw_train(axes: Any, points: Sequence[Mapping[str, float]], key: str, _: str) -> None:
    x, y = [p[key] for p in points], [p["loss"] for p in points]
    axes.plot(x, y, color=AFTER, alpha=0.3, linewidth=0.9)
    axes.plot(x, _smooth(y), color=AFTER, linewidth=1.9)
    axes.set_title("Training loss", loc="left")
    _generous(axes, y)


def _draw_validation(axes: Any, points: Sequence[Mapping[str, float]], key: str, measure: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    x, y = [p[key] for p in points], [p[measure] for p in points]
    axes.plot(x, y, color=ACCENT, linewidth=1.9, marker="o", markersize=4, markeredgewidth=0)
    axes.set_title(f"Validation {measure}", loc="left")
    axes.annotate(f"{y[-1]:.3g}", (x[-1], y[-1]), xytext=(0, 7), textcoords="offset points", ha="right", color=INK)
    if measure == "perplexity" and min(y) > 0:
        axes.set_yscale("log")
        low, high = min(y) / 1.08, max(y) * 1.08
        axes.set_ylim(low, high)
        axes.set_yticks(np.geomspace(min(y), max(y), 4) if max(y) > min(y) else [y[0]])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()


def _generous(axes: Any, y: Sequence[float]) -> None:
    """Leave a first, far-off step or two out of the scale, but never more than that."""
    if len(y) >= 20:
        low, high = float(np.min(y)), float(np.quantile(y, 0.985))
        axes.set_ylim(low - 0.06 * (high - low), high + 0.1 * (high - low) + 1e-9)


def _smooth(y: Sequence[float], share: float = 0.04) -> list[float]:
    """Mean over the 4 % of the steps around each (at least 5); fewer, but as many on both sides, at the ends."""
    reach = max(2, round(share * len(y) / 2))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(y, dtype=np.float64))])
    sides = [min(reach, i, len(y) - 1 - i) for i in range(len(y))]
    return [(sums[i + side + 1] - sums[i - side]) / (2 * side + 1) for i, side in enumerate(sides)]
