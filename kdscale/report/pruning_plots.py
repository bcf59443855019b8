"""The plots of the pruning section: cumulative importance, errors before and after compensation, candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdscale.config.candidate_scores import score_used
from kdscale.config.criteria import AXIS_TITLES
from kdscale.report.svg import ACCENT, AFTER, BEFORE, INK, MUTED, Plot, count_formatter, integers, make_plot, style

_ROLES = {"down": "Feed-forward output (down)", "o": "Attention output (o)"}

_SIZE_TITLES = {
    "params": "parameters", "bytes": "bytes on disk", "kv_bytes": "KV-cache bytes per token",
    "decode": "ms per token", "prefill": "ms per prompt",
}  # fmt: skip


def cumulative(facts: Mapping[str, Any]) -> Plot | None:
    """Share of importance that the best units hold, one panel per axis; None without scores."""
    if not facts["cumulative"]:
        return None
    curves = list(facts["cumulative"].items())

    def draw(figure: Any, narrow: bool) -> None:
        columns = 1 if narrow else len(curves)
        rows = len(curves) if narrow else 1
        for number, (axis, curve) in enumerate(curves):
            axes = figure.add_subplot(rows, columns, number + 1)
            x = [100 * share for share in curve["units"]]
            axes.fill_between(
                x, [100 * v for v in curve["low"]], [100 * v for v in curve["high"]], color=AFTER, alpha=0.18,
                linewidth=0,
            )  # fmt: skip
            axes.plot(x, [100 * v for v in curve["mean"]], color=AFTER, linewidth=1.9)
            if curve["kept_units"] < 1:
                axes.axvline(100 * curve["kept_units"], color=ACCENT, linewidth=1.6)
                if curve["kept_importance"] is not None:
                    kept = (100 * curve["kept_units"], 100 * curve["kept_importance"])
                    axes.plot(*kept, "o", color=ACCENT, markersize=6)
            axes.set_title(AXIS_TITLES[axis], loc="left")
            axes.set_xlabel("% of units, best first")
            if number == 0 or narrow:
                axes.set_ylabel("% of importance")
            axes.set_xlim(0, 100)
            axes.set_ylim(0, 101)
            style(axes)

    told = []
    for axis, curve in curves:
        kept = curve["kept_importance"]
        if curve["kept_units"] < 1 and kept is not None:
            told.append(f"{AXIS_TITLES[axis]}: the kept {curve['kept_units']:.0%} hold {kept:.0%}")
    sentence = f" {'; '.join(told)}." if told else ""
    dot = " The dot is what stays; heads are chosen inside their kv groups, which keeps a little less than the best."
    return make_plot(
        "Cumulative importance",
        "Mean over the kept layers; the band spans the least and the most concentrated layer, the line is the cut."
        f"{dot if told else ''}{sentence}",
        f"Curves of cumulative importance over units sorted by importance.{sentence}",
        draw,
        (880, 250),
        (350, 230 * len(curves)),
    )


def repair(facts: Mapping[str, Any]) -> Plot | None:
    """Relative error of each compensated projection, before and after; None when nothing was compensated."""
    rows = facts["repair"]["layers"] if facts["repair"] else []
    roles = [role for role in _ROLES if any(row["role"] == role for row in rows)]
    if not roles:
        return None

    def draw(figure: Any, narrow: bool) -> None:
        for number, role in enumerate(roles):
            axes = figure.add_subplot(*((len(roles), 1) if narrow else (1, len(roles))), number + 1)
            of_role = [row for row in rows if row["role"] == role]
            layers = [row["layer"] for row in of_role]
            before, after = [100 * row["before"] for row in of_role], [100 * row["after"] for row in of_role]
            axes.vlines(layers, after, before, color=MUTED, alpha=0.35, linewidth=1.2)
            axes.plot(layers, before, "o", color=ACCENT, markersize=4.5, label="sliced")
            axes.plot(layers, after, "o", color=AFTER, markersize=4.5, label="compensated")
            axes.set_title(_ROLES[role], loc="left")
            axes.set_xlabel("layer")
            if number == 0 or narrow:
                axes.set_ylabel("error, % of the output")
            axes.set_ylim(0, (1.3 if number == 0 else 1.08) * max(*before, *after, 1e-9))
            style(axes)
            axes.xaxis.set_major_locator(integers(6 if narrow else 10))
            if number == 0:
                axes.legend(frameon=False, ncols=2, loc="upper left", fontsize=9.5)

    told = []
    for role in roles:
        of_role = [row for row in rows if row["role"] == role]
        before, after = (sum(row[key] for row in of_role) / len(of_role) for key in ("before", "after"))
        told.append(f"{role} {before:.0%} → {after:.0%}")
    return make_plot(
        "Residual error, layer by layer",
        f"‖kept part − whole output‖ / ‖whole output‖ on calibration tokens. Mean: {', '.join(told)}.",
        f"Dot chart of relative errors by layer before and after compensation; mean {', '.join(told)}.",
        draw,
        (880, 260),
        (350, 230 * len(roles)),
    )


def candidates(facts: Mapping[str, Any]) -> Plot | None:
    """Quality against size, one dot per shape, by the most expensive score; None with fewer than two shapes."""
    plan = facts["plan"]
    tried = plan["candidates"] if plan else []
    if len(tried) < 2:
        return None
    quality, title, better = _quality(tried)
    kind = plan["target"]["kind"] or "params"
    size = {"decode": "decode_ms", "prefill": "prefill_ms"}.get(kind, kind)
    shown = [row for row in tried if quality(row) is not None and row.get(size) is not None]
    if len(shown) < 2:
        return None

    def draw(figure: Any, narrow: bool) -> None:
        axes = figure.add_subplot()
        axes.plot(
            [row[size] for row in shown[1:]], [quality(row) for row in shown[1:]], "o", color=BEFORE, markersize=5.5
        )
        chosen = shown[0]
        axes.plot([chosen[size]], [quality(chosen)], "o", color=AFTER, markersize=9)
        axes.annotate("chosen", (chosen[size], quality(chosen)), xytext=(0, 9), textcoords="offset points",
                      ha="center", color=INK)  # fmt: skip
        axes.margins(x=0.12, y=0.25)
        axes.set_xlabel(_SIZE_TITLES[kind])
        axes.set_ylabel(title)
        style(axes)
        axes.xaxis.set_major_formatter(count_formatter())
        axes.xaxis.set_major_locator(integers(3 if narrow else 7))

    sentence = f"{len(shown)} shapes by {_SIZE_TITLES[kind]} and {title}; {better} is better."
    return make_plot("", sentence, f"Scatter chart: {sentence}", draw, (880, 260), (350, 240))


def _quality(rows: Sequence[Mapping[str, Any]]) -> tuple[Any, str, str]:
    """(a function that reads the score of a row, the score's name, which direction is better)"""
    if rows[0]["probes"]:
        return (lambda row: row["probes"][-1]["loss"] if row["probes"] else None), "loss after a probe", "lower"
    if rows[0]["masked"]:
        used = score_used(rows[0]["masked"])
        better = "higher" if used.higher_is_better else "lower"
        return (lambda row: used.value(row["masked"]) if row["masked"] else None), used.title, better
    return (lambda row: row["score"]), "predicted score", "higher"
