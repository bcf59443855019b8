"""What each model gives for its size and speed: the points of the trade-off plots of one run or several. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdscale.runs.models import model_title


@dataclass(frozen=True)
class Point:
    """One model. `accuracy`: the mean over the downstream tasks, None where it was not measured."""

    label: str
    name: str  # of the model in its run
    run: str  # "" in the report of one run
    perplexity: float | None = None
    accuracy: float | None = None
    weight_bytes: int | None = None
    decode_tokens_per_second: float | None = None


@dataclass(frozen=True)
class Measure:
    """A figure of `Point`, with how an axis names it and which direction is good."""

    key: str
    title: str
    better: str  # "lower" or "higher"
    form: str  # as `comparison.written` takes it


PERPLEXITY = Measure("perplexity", "Perplexity", "lower", "number")
ACCURACY = Measure("accuracy", "Accuracy over tasks", "higher", "percent")
SIZE = Measure("weight_bytes", "Weights on disk", "lower", "size")
SPEED = Measure("decode_tokens_per_second", "Decode, tokens/s", "higher", "number")
QUALITIES, COSTS = (PERPLEXITY, ACCURACY), (SIZE, SPEED)


def points_of(
    evaluation: Mapping[str, Any] | None, accuracies: Mapping[str, float] | None = None, run: str = ""
) -> list[Point]:
    """The evaluated models in their order, with what was measured of each; `accuracies` is by name."""
    found = []
    for name, model in ((evaluation or {}).get("models") or {}).items():
        title = model_title(name)
        found.append(
            Point(
                label=f"{run}: {title}" if run else title,
                name=name,
                run=run,
                perplexity=(model.get("quality") or {}).get("perplexity"),
                accuracy=(accuracies or {}).get(name),
                weight_bytes=(model.get("size") or {}).get("weight_bytes"),
                decode_tokens_per_second=(model.get("efficiency") or {}).get("decode_tokens_per_second"),
            )
        )
    return found


def with_both(points: Sequence[Point], quality: Measure, cost: Measure) -> list[Point]:
    """The points that have both figures."""
    return [
        point for point in points if getattr(point, quality.key) is not None and getattr(point, cost.key) is not None
    ]


def front(points: Sequence[Point], quality: Measure, cost: Measure) -> list[Point]:
    """The Pareto front: the points that no other is as good as in both figures and better than in one; best first."""

    def good(point: Point) -> tuple[float, float]:
        cost_value, quality_value = getattr(point, cost.key), getattr(point, quality.key)
        return (
            -cost_value if cost.better == "lower" else cost_value,
            -quality_value if quality.better == "lower" else quality_value,
        )

    known = with_both(points, quality, cost)
    kept = [
        point
        for point in known
        if not any(
            all(theirs >= own for theirs, own in zip(good(other), good(point), strict=True))
            and good(other) != good(point)
            for other in known
        )
    ]
    return sorted(kept, key=good, reverse=True)


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of which `as_json` made these values."""
    return [Point(**{key: value for key, value in row.items() if key in Point.__dataclass_fields__}) for row in rows]


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points as plain values, each with the fronts that it is on."""
    fronts = {f"{quality.key}/{cost.key}": front(points, quality, cost) for quality in QUALITIES for cost in COSTS}
    return [
        asdict(point) | {"on_front_of": [name for name, kept in fronts.items() if point in kept]} for point in points
    ]
