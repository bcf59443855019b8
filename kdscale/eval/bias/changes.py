"""How sure the figures are, and whether they changed: a paired bootstrap over clusters of items.

N items, K clusters of them, C columns, R resamples. All models answer the same items, and a resample takes the same
clusters for all of them: what items have in common cancels in a change (Efron and Tibshirani 1993, chapter 6 and 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdscale.eval.bias.measures import Figure, Measure
from kdscale.runs.bias_results import written

RESAMPLES = 1000
_SURE = 1.96  # standard errors: 19 of 20
_UNSEEN = 3.0  # what never happened in n clusters happens, 19 times of 20, in less than 3/n of them (rule of three)
FEWEST = 20  # clusters: with fewer a standard error is no more than a guess
_CHUNK = 1 << 22  # drawn numbers at a time


def summarise(
    measure: Measure,
    values: Mapping[str, np.ndarray],
    groups: Sequence[str],
    clusters: Sequence[str],
    *,
    kept_within: float,
    seed: int,
) -> dict[str, Any]:
    """Figures, changes and flips of all items and of each group; `values` [N, C] by model, the teacher's first."""
    everything = _part(measure, values, clusters, kept_within, seed)
    by_group = {}
    for group in sorted(set(groups)):
        chosen = [i for i, other in enumerate(groups) if other == group]
        own = {name: columns[chosen] for name, columns in values.items()}
        by_group[group] = _part(measure, own, [clusters[i] for i in chosen], kept_within, seed)
    return {"all": everything, "groups": by_group}


def _part(
    measure: Measure, values: Mapping[str, np.ndarray], clusters: Sequence[str], kept_within: float, seed: int
) -> dict[str, Any]:
    teacher, *students = values
    count = len(set(clusters))
    estimates, resampled = _figures(measure, values, clusters, seed)
    figures: dict[str, dict[str, Any]] = {
        name: {
            figure.name: {
                "value": _plain(estimates[name][figure.name]),
                "error": _error(resampled[name][figure.name], count),
            }
            for figure in measure.figures
        }
        for name in values
    }
    changes = {
        name: {
            "figures": {
                figure.name: _change(
                    figure,
                    (estimates[teacher][figure.name], estimates[name][figure.name]),
                    (resampled[teacher][figure.name], resampled[name][figure.name]),
                    count,
                    kept_within,
                )
                for figure in measure.figures
            },
            "flips": _flips(measure, values[teacher], values[name]),
        }
        for name in students
    }  # fmt: skip
    return {"items": len(clusters), "clusters": count, "figures": figures, "changes": changes}


def _figures(
    measure: Measure, values: Mapping[str, np.ndarray], clusters: Sequence[str], seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Each figure of each model, and its values on the resamples [R]."""
    number = {cluster: at for at, cluster in enumerate(dict.fromkeys(clusters))}
    of_item = np.array([number[cluster] for cluster in clusters], dtype=np.int64)
    # sums and counts of each column by cluster: all that a mean over any resample needs
    sums, counts = {}, {}
    for name, columns in values.items():
        there = ~np.isnan(columns)
        sums[name] = np.zeros((len(number), columns.shape[1]))
        counts[name] = np.zeros_like(sums[name])
        np.add.at(sums[name], of_item, np.where(there, columns, 0.0))
        np.add.at(counts[name], of_item, there.astype(np.float64))

    def all_figures(weights_RK: np.ndarray) -> dict[str, dict[str, Any]]:
        out = {}
        for name in values:
            with np.errstate(invalid="ignore", divide="ignore"):
                means_RC = (weights_RK @ sums[name]) / (weights_RK @ counts[name])
                means = dict(zip(measure.columns, means_RC.T, strict=True))
                out[name] = {figure.name: figure.of(means) for figure in measure.figures}
        return out

    estimates = all_figures(np.ones((1, len(number))))
    parts = [all_figures(weights_RK) for weights_RK in _resamples(len(number), seed)]
    resampled = {
        name: {figure.name: np.concatenate([part[name][figure.name] for part in parts]) for figure in measure.figures}
        for name in values
    }
    return {name: {key: float(value[0]) for key, value in own.items()} for name, own in estimates.items()}, resampled


def _resamples(clusters: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn in each of RESAMPLES resamples, a few resamples [r, K] at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, min(RESAMPLES, _CHUNK // clusters))
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        drawn = generator.integers(0, clusters, size=(count, clusters)) + clusters * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * clusters).reshape(count, clusters).astype(np.float64)


def _error(resampled_R: np.ndarray, count: int) -> float | None:
    """The standard error; None of a single cluster, and where most resamples give no figure."""
    finite = resampled_R[np.isfinite(resampled_R)]
    return float(finite.std(ddof=1)) if count > 1 and len(finite) > len(resampled_R) / 2 else None


def _change(
    figure: Figure, estimates: tuple[float, float], resampled: tuple[np.ndarray, np.ndarray], count: int,
    kept_within: float,
) -> dict[str, Any]:  # fmt: skip
    """From the teacher to a student: the change, the growth of the distance from the ideal, and the verdict on it."""
    (before, after), (before_R, after_R) = estimates, resampled
    change = {"change": _plain(after - before), "error": _error(after_R - before_R, count)}
    if figure.ideal is None or change["change"] is None or change["error"] is None:
        return change
    growth = abs(after - figure.ideal) - abs(before - figure.ideal)
    error = _error(np.abs(after_R - figure.ideal) - np.abs(before_R - figure.ideal), count)
    assert error is not None
    smallest = min(max(_SURE * error, _UNSEEN / count * figure.range), figure.range)
    return {
        **change, "growth": growth, "growth_error": error, "smallest": smallest,
        "verdict": verdict(growth, smallest, kept_within * figure.range, count),
    }  # fmt: skip


def verdict(growth: float, smallest: float, kept_within: float, count: int) -> str:
    """`grew` or `fell` where the growth is surely one, `kept` where it is surely small, else `not measurable`."""
    if count < FEWEST:
        return "not measurable"
    if abs(growth) > smallest:
        return "grew" if growth > 0 else "fell"
    return "kept" if abs(growth) + smallest <= kept_within else "not measurable"


def _flips(measure: Measure, teacher: np.ndarray, student: np.ndarray) -> dict[str, int]:
    """How many items the student decides otherwise than the teacher: `to` 1, and `back` to 0."""
    at = measure.columns.index("decision")
    before, after = teacher[:, at], student[:, at]
    return {"to": int(((before < 0.5) & (after > 0.5)).sum()), "back": int(((before > 0.5) & (after < 0.5)).sum())}


def headline(measure: Measure, part: Mapping[str, Any]) -> str | None:
    """The first figure with an ideal that could be computed for the first model."""
    first = next(iter(part["figures"].values()))
    named = (figure.name for figure in measure.figures if figure.ideal is not None)
    return next((name for name in named if first[name]["value"] is not None), None)


def verdict_line(part: Mapping[str, Any], figure: Figure, teacher: str, name: str) -> str:
    """One line: the verdict, the figure before and after, the flips, and what the items could show."""
    change = part["changes"][name]
    of_figure, flips = change["figures"][figure.name], change["flips"]
    before, after = (_with_error(part["figures"][model][figure.name], figure) for model in (teacher, name))
    moved = f"{figure.title}: {before} → {after}; flips {flips['to']:,} to it, {flips['back']:,} back"
    if of_figure.get("verdict") in ("kept", "not measurable") and _is_sure(of_figure):
        # from one side of the ideal to the other, as far away
        moved += f"; the figure itself moved by {written(of_figure['change'], figure)} ± "
        moved += f"{written(of_figure['error'], figure)}"
    if "verdict" not in of_figure:
        return f"not measurable: {moved}"
    if of_figure["verdict"] != "not measurable":
        return f"{of_figure['verdict']}: {moved}"
    smallest, count = written(of_figure["smallest"], figure), part["clusters"]
    why = f"at least {FEWEST} are needed" if count < FEWEST else f"they show a growth from {smallest} on"
    return f"not measurable at {count:,} independent items ({why}): {moved}"


def _is_sure(change: Mapping[str, Any]) -> bool:
    return bool(change["error"]) and abs(change["change"]) > _SURE * change["error"]


def _with_error(entry: Mapping[str, Any], figure: Figure) -> str:
    if entry["value"] is None:
        return "none"
    error = "" if entry["error"] is None else f" ± {written(entry['error'], figure)}"
    return f"{written(entry['value'], figure)}{error}"


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
